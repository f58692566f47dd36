"""Runs a GGUF file in llama.cpp.

`run_gguf.py FILE TEXT N` prints, as JSON, the text's ids, the N tokens that follow greedily, and the log-probabilities
of the five likeliest first ones; with what the file says of itself.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

import gguf
import xllamacpp


def main(path: str, text: str, n_tokens: str) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = path, 256, 1
    settings.warmup = settings.fit_params = False
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.port = 0
    server = xllamacpp.Server(settings)

    def post(place: str, **question: object) -> dict[Any, Any]:
        data = json.dumps(question).encode()
        request = urllib.request.Request(server.listening_address + place, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    ids = post("/tokenize", content=text, add_special=True)["tokens"]
    said = post("/completion", prompt=ids, n_predict=int(n_tokens), temperature=0, n_probs=5, return_tokens=True)
    first = {str(token["id"]): token["logprob"] for token in said["completion_probabilities"][0]["top_logprobs"]}
    fields = gguf.GGUFReader(path).fields
    facts = {name: fields[name].contents() for name in fields if not name.startswith("tokenizer.ggml.")}
    facts = {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
    print(json.dumps({"ids": ids, "next": said["tokens"], "first": first, "facts": facts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
