"""FidoReader: a reader as a transformer of PyTerrier (pip install python-terrier), with the columns of pyterrier-rag's readers.

pipeline = bm25 % 10 >> FidoReader("127.0.0.1:8001", model="fido")
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pyterrier as pt

from ..errors import ReaderError
from ..reader_client import ReaderClient

COLUMNS = ("qid", "query", "qanswer", "log_prob", "tokens", "documents")


class FidoReader(pt.Transformer):
    """Answers each query from its rows: qid, query, docno, text -> qid, query, qanswer, one row a query.

    A column "title" is the passages' title. Rows are read by descending "score" where there is one. The output also has log_prob, tokens
    and "documents": a list of {"docno", "title", "text", "reader_score"}, the most used first.

    Args:
        url: "host:port" of Triton's endpoint.
        model: The reader's name on the server.
        num_context: At most so many passages of a query; None: all.
        max_new_tokens: Maximum number of answer tokens; None: the server's default.
        concurrency: How many queries are in flight at a time.
        options: ReaderClient's other arguments.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        model: str = "fido",
        *,
        num_context: int | None = None,
        max_new_tokens: int | None = None,
        concurrency: int = 8,
        **options: Any,
    ) -> None:
        self.num_context, self.max_new_tokens, self.concurrency = num_context, max_new_tokens, concurrency
        self._client = ReaderClient(url, model, **options)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """One row a query, in the order of the input.

        Raises:
            ReaderError: If a request is refused, or the server failed.
        """
        pt.validate.columns(inp, includes=["qid", "query", "docno", "text"])
        groups = list(self._groups(inp))
        asked = (
            {
                "question": query,
                "passages": [{"title": row["title"], "text": row["text"]} for row in rows],
                "max_new_tokens": self.max_new_tokens,
            }
            for _, query, rows in groups
        )
        answered = []
        for (qid, query, rows), answer in zip(groups, self._client.answer_many(asked, self.concurrency)):
            if isinstance(answer, ReaderError):
                raise answer
            scores = answer.passage_scores or (0.0,) * len(rows)
            read = [{**row, "reader_score": score} for score, row in sorted(zip(scores, rows), key=lambda pair: -pair[0])]
            answered.append((qid, query, answer.text, answer.log_prob, answer.tokens, read))
        return pd.DataFrame(answered, columns=list(COLUMNS))

    def _groups(self, inp: pd.DataFrame) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        for qid, frame in inp.groupby("qid", sort=False):
            if "score" in frame:
                frame = frame.sort_values("score", ascending=False, kind="stable")
            rows = frame.head(self.num_context or len(frame)).to_dict("records")
            yield (
                str(qid),
                str(rows[0]["query"]),
                [{"docno": row["docno"], "title": str(row.get("title") or ""), "text": str(row["text"])} for row in rows],
            )
