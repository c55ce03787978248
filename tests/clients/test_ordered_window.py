from hypothesis import given
from hypothesis import strategies as st

from fido_client.ordered_window import OrderedWindow


@given(st.integers(0, 60), st.integers(1, 5), st.randoms())
def test_every_completion_order_gives_results_in_request_order(count: int, concurrency: int, random: object) -> None:
    window: OrderedWindow[int, int] = OrderedWindow(range(count), concurrency)
    running: dict[int, int] = {}
    results: list[int] = []
    while not window.is_exhausted:
        running.update(window.start())
        assert len(running) == window.in_flight <= concurrency
        results += window.due()
        if running:
            index = random.choice(sorted(running))  # type: ignore[attr-defined]
            window.finish(index, running.pop(index) * 10)
    assert results == [index * 10 for index in range(count)]


def test_read_ahead_of_a_stuck_request_is_bounded() -> None:
    window: OrderedWindow[int, int] = OrderedWindow(iter(range(10_000)), 2)
    started = dict(window.start())
    for _ in range(10_000):
        for index in sorted(set(started) - {0}):
            window.finish(index, started.pop(index))
        assert list(window.due()) == []
        more = dict(window.start())
        if not more:
            break
        started |= more
    assert window.in_flight == 1
    window.finish(0, 0)
    assert len(list(window.due())) == 32  # 16 * concurrency
