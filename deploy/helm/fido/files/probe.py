"""Whether every reader of this pod answers. Triton 2.51 says that it is ready while the process of a Python model is dead.

Each reader gets an empty question with the launcher's id of such questions: a live model refuses it itself and counts it nowhere.
Exit status: 0 if all do, else 1.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request

URL = f"http://127.0.0.1:{sys.argv[1] if len(sys.argv) > 1 else 8000}/v2/"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the server is in this pod
LIVE = "wanted text"  # from the refusal of an empty question


def post(path: str, body: dict[str, object]) -> str:
    """The text of Triton's reply, of an error too."""
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=5) as reply:
            return str(reply.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


try:
    models = json.loads(post("repository/index", {}))
    broken = [f"{model['name']}: {model.get('reason')}" for model in models if model.get("state") != "READY"]
    readers = [model["name"] for model in models if not model["name"].endswith(("_encoder", "_stream"))]
    empty = {"shape": [1], "datatype": "BYTES", "data": [""]}
    for name in readers:
        inputs = [{"name": "question", **empty}, {"name": "passages", **empty}]
        answer = post(f"models/{name}/infer", {"id": "liveness", "inputs": inputs})
        if LIVE not in answer:
            broken.append(f"{name}: {answer}")
except (OSError, ValueError) as error:
    sys.exit(f"no answer from Triton: {error}")
if broken or not readers:
    sys.exit("; ".join(broken) or "no reader is loaded")
