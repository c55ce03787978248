"""Ask a served reader by tritonclient alone: pip install "tritonclient[grpc]". Nothing of this repository is needed.

    python examples/plain_tritonclient.py "what is the capital of France?" "Its capital is Paris." "Another passage."

Options: --url (127.0.0.1:8001) and --model (fido). The answer, its log-probability and a score for each passage go to standard output.
"""

from __future__ import annotations

import argparse

import numpy as np
import tritonclient.grpc as triton


def text_tensor(name: str, texts: list[str]) -> triton.InferInput:
    """A tensor of type BYTES with one element a text."""
    tensor = triton.InferInput(name, [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], np.object_))
    return tensor


def main() -> None:
    """Send one request and print the response."""
    parser = argparse.ArgumentParser(description="Ask a served reader by tritonclient alone.")
    parser.add_argument("question")
    parser.add_argument("passages", nargs="+")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--model", default="fido")
    args = parser.parse_args()

    inputs = [text_tensor("question", [args.question]), text_tensor("passages", args.passages)]
    with triton.InferenceServerClient(args.url) as client:
        result = client.infer(args.model, inputs, client_timeout=60)
    print(f"answer    {result.as_numpy('answer')[0].decode()}")
    print(f"log-prob  {result.as_numpy('log_prob')[0]:.4f}")
    print(f"scores    {' '.join(f'{score:.2f}' for score in result.as_numpy('passage_scores'))}")


if __name__ == "__main__":
    main()
