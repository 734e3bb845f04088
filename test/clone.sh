#!/usr/bin/env bash
# A newcomer's first minutes: a fresh clone, an empty home, empty caches, and on PATH nothing but npm, or Bun,
# or Deno; once more with a foreign node_modules in a parent directory. Prints the seconds to the first 200.
# Needs: a checkout with tools/node_modules (bun run setup:tools), node and npm.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
passed=0
failed=0
pid=

cleanup() {
  [ -z "$pid" ] || kill "$pid" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

# A directory that has just these programs: PATH is that and the system's shell tools.
system() {
  mkdir -p "$1"
  local tool
  for tool in sh bash env git uname cat mkdir rm ls dirname readlink sed; do
    ln -sf "$(command -v "$tool")" "$1/$tool"
  done
}
system "$work/npm"
for tool in node npm npx; do ln -s "$(command -v "$tool")" "$work/npm/$tool"; done
system "$work/bun"
ln -s "$(readlink -f "$root/tools/node_modules/.bin/bun")" "$work/bun/bun"
system "$work/deno"
ln -s "$(readlink -f "$root/tools/node_modules/.bin/deno")" "$work/deno/deno"

# try NAME PATH-DIRECTORY PARENT COMMAND...
try() {
  local name=$1 path=$2 parent=$3
  shift 3
  local home port log began now
  home=$(mktemp -d "$work/home.XXXXXX")
  log="$home/log"
  mkdir -p "$parent"
  rm -rf "$parent/tidegate"
  git clone --quiet "file://$root" "$parent/tidegate"
  port=$(node -e 'const s=require("net").createServer().listen(0,"127.0.0.1",()=>{console.log(s.address().port);s.close()})')
  began=$(date +%s%N)
  (
    cd "$parent/tidegate"
    exec setsid env -u BUN_INSTALL -u BUN_INSTALL_CACHE_DIR -u DENO_DIR -u DENO_INSTALL -u XDG_CACHE_HOME \
      HOME="$home" TMPDIR="$home" npm_config_cache="$home/npm" PATH="$path" PORT="$port" "$@"
  ) >"$log" 2>&1 &
  pid=$!
  local code=000
  for _ in $(seq 1 1200); do
    code=$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$port/v1/models" || true)
    [ "$code" = 200 ] && break
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  now=$(date +%s%N)
  local model answer=000
  model=$(curl -s "http://127.0.0.1:$port/v1/models" | sed -n 's/.*"id":"\([^"]*\)".*/\1/p' || true)
  answer=$(curl -s -m 60 -o /dev/null -w '%{http_code}' "http://127.0.0.1:$port/v1/chat/completions" \
    -d "{\"model\":\"$model\",\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"max_tokens\":2}" || true)
  # npx does not pass signals on: the whole group ends.
  kill -TERM -- "-$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  pid=
  if [ "$code" = 200 ] && [ "$answer" = 200 ]; then
    passed=$((passed + 1))
    printf 'clone: %-34s first 200 after %d.%01d s\n' "$name" $(((now - began) / 1000000000)) $(((now - began) / 100000000 % 10))
  else
    failed=$((failed + 1))
    printf 'clone: %-34s FAILED (%s, %s)\n' "$name" "$code" "$answer"
    tail -n 30 "$log"
  fi
  rm -rf "$home"
}

foreign="$work/foreign"
mkdir -p "$foreign/node_modules/zod" "$foreign/node_modules/hono"
for package in zod hono; do
  printf '{"name":"%s","version":"0.0.1","main":"index.js"}' "$package" >"$foreign/node_modules/$package/package.json"
  printf 'throw new Error("the %s of a parent directory was loaded");' "$package" >"$foreign/node_modules/$package/index.js"
done

for place in clean foreign; do
  try "npm only, $place" "$work/npm" "$work/$place" npx -y bun@1.4.5 run start
  try "Bun only, $place" "$work/bun" "$work/$place" bun run start
  try "Deno only, $place" "$work/deno" "$work/$place" deno task start
done
printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
