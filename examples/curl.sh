#!/bin/sh
# Ask a served reader over HTTP: examples/curl.sh [URL [MODEL]]
set -eu
url=${1:-http://127.0.0.1:8000}
model=${2:-fido}
curl --silent --show-error --fail-with-body "$url/v2/models/$model/generate" --data '{
  "question": "what is the capital of France?",
  "passages": ["Its capital is Paris.", "French is the official language."],
  "titles": ["France: Capital", "France: Languages"],
  "max_new_tokens": 16
}'
echo
