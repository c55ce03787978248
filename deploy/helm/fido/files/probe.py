"""Whether every reader of this pod answers. Triton 2.51 says that it is ready while the process of a Python model is dead.

Each reader gets an empty question, which a live model refuses itself. Exit status: 0 if all do, else 1.
"""

import json
import sys
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8000/v2/"
DEAD = ("not healthy", "not ready", "no available versions", "Failed to process", "unknown model", "unavailable")


def post(path, body):
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


try:
    models = json.loads(post("repository/index", {}))
    broken = [f"{model['name']}: {model.get('reason')}" for model in models if model.get("state") != "READY"]
    readers = [model["name"] for model in models if not model["name"].endswith(("_encoder", "_stream"))]
    empty = {"shape": [1], "datatype": "BYTES", "data": [""]}
    for name in readers:
        inputs = [{"name": "question", **empty}, {"name": "passages", **empty}]
        answer = post(f"models/{name}/infer", {"id": "liveness-probe", "inputs": inputs})
        if any(text in answer for text in DEAD):
            broken.append(f"{name}: {answer}")
except (OSError, ValueError) as error:
    sys.exit(f"no answer from Triton: {error}")
if broken or not readers:
    sys.exit("; ".join(broken) or "no reader is loaded")
