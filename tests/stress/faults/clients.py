"""Faults that clients commit: malformed requests, cancelling, impatience, slowness, hanging up, too many at once."""

from __future__ import annotations

import functools
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from serving.launcher.server import LOOPBACK
from tests.stress.arena import MODELS, Arena, from_server, good_company, judge_good, reader_of
from tests.stress.asking import TIMEOUT_S, Asker, Outcome, ask_http, exchange, judged, judged_http
from tests.stress.mutants.grpc import Mutant, grpc_mutants, random_bytes
from tests.stress.mutants.http import http_mutants, request
from tests.stress.questions import Case
from tests.stress.tally import Tally, Verdict

THREADS = 4
AT_ONCE_S = 1.0  # a refusal for want of room must not take longer
SLOW_CHUNK_BYTES, SLOW_PAUSE_S = 64, 0.01


def long_case(arena: Arena, model: str) -> Case:
    """A reference question with a long answer: something is still under way when the fault strikes."""
    return max(arena.cases[reader_of(model)], key=lambda case: case.tokens)


def short_question(arena: Arena, tally: Tally) -> None:
    """No fault: the shortest question to every model, alone."""
    for model in MODELS:
        case = min(arena.cases[reader_of(model)], key=lambda case: (len(case.passages), case.tokens))
        tally.judge(*arena.asker.ask(case, model))


def in_threads(tally: Tally, tries: Iterable[Callable[[], None]], threads: int = THREADS) -> None:
    """Run all tries; one that raises is a lost answer."""

    def guarded(attempt: Callable[[], None]) -> None:
        try:
            attempt()
        except Exception as error:
            tally.judge(Verdict.LOST, f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(guarded, tries))


def judge_mutant(tally: Tally, mutant: Mutant, answered: bool, what: str) -> None:
    """An answer to what must be refused is wrong; all else is well."""
    if answered and mutant.must_be_refused:
        tally.judge(Verdict.WRONG, f"{mutant.kind}: answered, not refused")
    else:
        tally.judge(Verdict.RIGHT if answered else Verdict.TOLD, what)


def malformed_grpc(arena: Arena, tally: Tally) -> None:
    """Thousands of malformed gRPC requests, good ones among them."""
    sources = {m: grpc_mutants(random.Random(arena.rng.random()), arena.cases[reader_of(m)], m, arena.limits[reader_of(m)]) for m in MODELS}

    def attempt(model: str, mutant: Mutant) -> None:
        try:
            answered, what = arena.asker.send_raw(mutant.content, model, TIMEOUT_S)
        except TimeoutError as error:
            tally.judge(Verdict.LOST, f"{model}: {mutant.kind}: {error}")
        else:
            judge_mutant(tally, mutant, answered, what)

    drawn = [(model, next(sources[model])) for _ in range(arena.many(2_400) // len(MODELS)) for model in MODELS]
    with good_company(arena, tally):
        in_threads(tally, [functools.partial(attempt, *one) for one in drawn])


def malformed_http(arena: Arena, tally: Tally) -> None:
    """Thousands of malformed HTTP requests, good ones among them."""
    sources = {m: http_mutants(random.Random(arena.rng.random()), arena.cases[reader_of(m)], m, arena.limits[reader_of(m)]) for m in MODELS}

    def attempt(model: str, mutant: Mutant) -> None:
        try:
            try:
                status, body = exchange(arena.server.http_port, mutant.content, TIMEOUT_S, patience_s=1.0)
            except TimeoutError:
                # Perhaps a good request that took longer than our patience: Triton drops its answer when our half ends. Wait for this one.
                status, body = exchange(arena.server.http_port, mutant.content, TIMEOUT_S)
        except TimeoutError:
            tally.judge(Verdict.LOST, f"{model}: {mutant.kind}: nothing within {TIMEOUT_S:.0f} s to {mutant.content[:200]!r}")
        else:
            answered = status == 200 and b'"error"' not in body
            judge_mutant(tally, mutant, answered, f"HTTP {status}")

    drawn = [(model, next(sources[model])) for _ in range(arena.many(2_400) // len(MODELS)) for model in MODELS]
    with good_company(arena, tally):
        in_threads(tally, [functools.partial(attempt, *one) for one in drawn])


def cancel_storm(arena: Arena, tally: Tally) -> None:
    """Unary requests cancelled at any moment, many at a time; what is not cancelled in time must be answered right."""
    for _ in range(arena.many(10)):
        calls = []
        for i in range(arena.many(40)):
            model = MODELS[0] if i % 2 else MODELS[2]
            case = long_case(arena, model)
            calls.append((arena.asker.start(case, model), case, model))
        for call, _case, _model in arena.rng.sample(calls, len(calls) * 3 // 4):
            time.sleep(arena.rng.random() * 0.005)
            call.cancel()
        for call, case, model in calls:
            tally.judge(*judged(call, case, model))


def cancel_storm_streams(arena: Arena, tally: Tally) -> None:
    """Streams cancelled before their first piece, or in mid-answer."""

    def attempt(model: str, pieces: int, backoff_s: float) -> None:
        case = long_case(arena, model)
        responses = arena.asker.start_stream(case, model)
        time.sleep(backoff_s)
        text = ""
        for _ in range(pieces):
            response = next(responses, None)
            if response is None or response.error_message:
                break
            text += response.infer_response.raw_output_contents[0][4:].decode() if response.infer_response.raw_output_contents else ""
        responses.cancel()
        right = case.text.startswith(text)
        tally.judge(Verdict.RIGHT if right else Verdict.WRONG, f"wanted the start of {case.text!r}, got {text!r}")

    rng = arena.rng
    tries = [(rng.choice([MODELS[1], MODELS[3]]), rng.choice([0, 0, 1, 3]), rng.random() * 0.01) for _ in range(arena.many(300))]
    in_threads(tally, [functools.partial(attempt, *one) for one in tries], threads=16)


def mixed_kinds(arena: Arena, tally: Tally) -> None:
    """Greedy answers, beams, choices and dropped tokens at the same time, over gRPC and HTTP, streams beside; a third is cancelled.

    No fault of one client: whoever shares a step with whoever leaves must be answered as alone.
    """
    rng, cases = arena.rng, []
    for model in MODELS[::2]:
        limits = arena.limits[model]
        for case in arena.cases[model]:
            made = [case.with_beams(rng, limits), case.with_elimination(rng), *(case.with_choices(rng, limits) for _ in range(2))]
            for one in made:
                from_server(arena, one, model)
            cases += [(one, model) for one in (case, *made)]

    def attempt(case: Case, model: str, cancelled: bool, over_http: bool, backoff_s: float) -> None:
        if cancelled:
            call = arena.asker.start(case, model)
            time.sleep(backoff_s)
            call.cancel()
            tally.judge(*judged(call, case, model))
        elif over_http:
            judge_good(tally, ask_http(arena.server.http_port, case, model))
        else:
            judge_good(tally, arena.asker.ask(case, model))

    tries = [(*rng.choice(cases), rng.random() < 0.33, rng.random() < 0.3, rng.random() * 0.03) for _ in range(arena.many(400))]
    with good_company(arena, tally):
        in_threads(tally, [functools.partial(attempt, *one) for one in tries], threads=16)


def deadlines_too_short(arena: Arena, tally: Tally) -> None:
    """Deadlines that pass before the answer: gRPC's, and the request's own `timeout`."""

    def attempt(model: str, own: bool, seconds: float) -> None:
        case = long_case(arena, model)
        if own:
            outcome = arena.asker.ask(case, model, timeout_us=max(1, int(seconds * 1e6)))
        else:
            outcome = arena.asker.ask(case, model, timeout_s=seconds, hasty=True)
        tally.judge(*outcome)

    tries = [(arena.rng.choice(MODELS), arena.rng.random() < 0.5, arena.rng.random() ** 2 * 0.05) for _ in range(arena.many(400))]
    with good_company(arena, tally):
        in_threads(tally, [functools.partial(attempt, *one) for one in tries], threads=16)


def dropped_at_their_error(arena: Arena, tally: Tally) -> None:
    """Streams that are cancelled as soon as they bring an error. Triton 2.51 keeps each such request for good, some 15 KB."""

    def attempt(model: str, seconds: float) -> None:
        case = long_case(arena, model)
        responses = arena.asker.start_stream(case, model, timeout_us=max(1, int(seconds * 1e6)))
        for response in responses:
            if response.error_message:
                responses.cancel()
                tally.judge(Verdict.TOLD, response.error_message[:200])
                return
        tally.judge(Verdict.RIGHT)

    tries = [(arena.rng.choice([MODELS[1], MODELS[3]]), arena.rng.random() * 0.05) for _ in range(arena.many(200))]
    with good_company(arena, tally):
        in_threads(tally, [functools.partial(attempt, *one) for one in tries], threads=16)


def slow_readers(arena: Arena, tally: Tally) -> None:
    """Clients that take their answers a few bytes at a time: theirs must be whole, and others' must not wait for them."""

    def over_http(model: str) -> None:
        case = long_case(arena, model)
        tally.judge(*read_slowly(arena.server.http_port, case, model))

    def over_grpc(model: str) -> None:
        case, text = long_case(arena, model), ""
        for response in arena.asker.start_stream(case, model):
            time.sleep(SLOW_PAUSE_S)
            if response.error_message:
                tally.judge(Verdict.WRONG, f"a good question got no answer: {response.error_message}")
                return
            if response.infer_response.raw_output_contents:
                text += response.infer_response.raw_output_contents[0][4:].decode()
        tally.judge(Verdict.RIGHT if text == case.text else Verdict.WRONG, f"wanted {case.text!r}, got {text!r}")

    n = arena.many(24)
    with good_company(arena, tally):
        in_threads(tally, [functools.partial((over_http, over_grpc)[i % 2], MODELS[1 + i // 2 % 2 * 2]) for i in range(n)], threads=n)


def read_slowly(port: int, case: Case, model: str) -> Outcome:
    """Ask for a stream over HTTP through a receive buffer of the smallest size, and read it a few bytes at a time."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(TIMEOUT_S)
        connection.connect((LOOPBACK, port))
        connection.sendall(request(f"/v2/models/{model}/generate_stream", json.dumps(case.body()).encode()))
        received = b""
        while part := connection.recv(SLOW_CHUNK_BYTES):
            received += part
            time.sleep(SLOW_PAUSE_S / 4)
    head, _, body = received.partition(b"\r\n\r\n")
    if b" 200 " not in head.splitlines()[0]:
        return Verdict.WRONG, f"a good question got no answer: {received[:200]!r}"
    return judged_http(unchunked(body), case)


def unchunked(body: bytes) -> bytes:
    """The content of a chunked body; as much as there is of one that breaks off."""
    content = b""
    while True:
        size, newline, rest = body.partition(b"\r\n")
        if not newline or not (length := int(size, 16)):
            return content
        content, body = content + rest[:length], rest[length + 2 :]


def hanging_up(arena: Arena, tally: Tally) -> None:
    """Connections closed or reset in mid-request and mid-answer, on both ports. Who hung up cannot be told; the server must not mind."""

    def over_http(model: str, keep: float, linger: bool, read: int) -> None:
        endpoint = "generate_stream" if model.endswith("_stream") else "generate"
        content = request(f"/v2/models/{model}/{endpoint}", json.dumps(long_case(arena, model).body()).encode())
        hang_up(arena.server.http_port, content[: max(1, int(len(content) * keep))], linger, read)

    def over_grpc(content: bytes, linger: bool) -> None:
        hang_up(arena.server.grpc_port, content, linger, 0)

    def in_mid_call(model: str, backoff_s: float) -> None:
        asker = Asker(arena.server.grpc_url, arena.server.http_port)
        call = (asker.start_stream if model.endswith("_stream") else asker.start)(long_case(arena, model), model)
        time.sleep(backoff_s)
        asker.close()
        del call

    rng = arena.rng
    tries: list[Callable[[], None]] = []
    for i in range(arena.many(300)):
        model, linger, read = rng.choice(MODELS), rng.random() < 0.5, rng.choice([0, 0, 1, 200])
        if i % 3 == 0:
            tries.append(functools.partial(over_http, model, rng.choice([rng.random(), 1.0]), linger, read))
        elif i % 3 == 1:
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random_bytes(rng, rng.randint(0, 200))
            tries.append(functools.partial(over_grpc, preface[: rng.randint(1, len(preface))], linger))
        else:
            tries.append(functools.partial(in_mid_call, model, rng.random() * 0.03))

    def counted(attempt: Callable[[], None]) -> None:
        attempt()
        tally.judge(Verdict.TOLD)

    with good_company(arena, tally):
        in_threads(tally, [functools.partial(counted, attempt) for attempt in tries])


def hang_up(port: int, content: bytes, reset: bool, read: int) -> None:
    """Send, read a little or nothing, and close; or reset the connection."""
    with socket.create_connection((LOOPBACK, port), timeout=TIMEOUT_S) as connection:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            connection.sendall(content)
            if read:
                connection.settimeout(0.2)
                connection.recv(read)
        except OSError:
            pass  # the server may have been first to hang up


def overload(arena: Arena, tally: Tally) -> None:
    """Far more questions at once than may wait: every one is answered right, or refused at once."""
    model = MODELS[2]
    most = arena.limits[reader_of(model)].max_in_flight
    case = long_case(arena, model)
    started = time.monotonic()
    calls = [(arena.asker.start(case, model, 120.0), time.monotonic()) for _ in range(most + arena.many(400))]
    slowest = 0.0
    ended: list[tuple[float, Outcome]] = []
    for call, sent in calls:
        call.add_done_callback(lambda call, sent=sent: ended.append((time.monotonic() - sent, judged(call, case, model))))
    while len(ended) < len(calls) and time.monotonic() < started + 150:
        time.sleep(0.02)
    for seconds, (verdict, what) in ended:
        if verdict is Verdict.TOLD:
            slowest = max(slowest, seconds)
            if not what.startswith("UNAVAILABLE"):
                verdict, what = Verdict.WRONG, f"refused, but not as UNAVAILABLE: {what}"
        tally.judge(verdict, what)
    for _ in range(len(calls) - len(ended)):
        tally.judge(Verdict.LOST, "nothing within 150 s")
    if not tally.verdicts[Verdict.TOLD]:
        tally.unmeasured.append(f"{len(calls)} questions at once were all taken, though {most} may wait")
    elif slowest > AT_ONCE_S:
        tally.remarks.append(f"the slowest refusal took {slowest:.1f} s")
    judge_good(tally, arena.asker.ask(case, model))
