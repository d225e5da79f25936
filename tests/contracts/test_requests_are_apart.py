"""Contract 4: interleaved requests on one model give what sequential ones give."""

import threading

from tiny import doc, ids_of, limits, tiny_model

from zipper_lm import Document, ZipperModel

FIRST = doc(("speech", [5, 6, 7, 8]))
SECOND = doc(("text", [5, 6, 7, 8, 9, 10, 11]), ("speech", [9, 9, 3]))
SCHEDULE = ["text", "speech", "text"]


def alone(model: ZipperModel, document: Document) -> list:
    return list(model.stream(document, SCHEDULE, settings=limits(model, 8)))


def test_streams_in_turn() -> None:
    model = tiny_model(gate=1.0)
    expected = [alone(model, FIRST), alone(model, SECOND)]
    assert expected[0] != expected[1]
    streams = [iter(model.stream(d, SCHEDULE, settings=limits(model, 8))) for d in (FIRST, SECOND)]
    got: list[list] = [[], []]
    while streams[0] or streams[1]:
        for k in (0, 1):
            if streams[k]:
                token = next(streams[k], None)
                if token is None:
                    streams[k] = None  # type: ignore[call-overload]
                else:
                    got[k].append(token)
    assert got == expected


def test_threads() -> None:
    model = tiny_model(3, gate=1.0)
    settings = limits(model, 8)
    jobs = [[FIRST], [SECOND], [FIRST, SECOND], [doc(("image", [4, 5]))]] * 2
    expected = [ids_of(model.generate(job, SCHEDULE, settings=settings)) for job in jobs]
    got: list = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(k: int) -> None:
        start.wait()
        got[k] = ids_of(model.generate(jobs[k], SCHEDULE, settings=settings))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_a_stream_while_training_goes_on() -> None:
    """Reading and writing leave nothing behind that a forward in between could see."""
    from zipper_lm.data.collation import collate

    model = tiny_model(gate=1.0)
    expected = alone(model, FIRST)
    batch = collate([SECOND], model.specials)
    logits = model(batch).logits["text"]
    got = []
    for token in model.stream(FIRST, SCHEDULE, settings=limits(model, 8)):
        got.append(token)
        assert model(batch).logits["text"].equal(logits)
    assert got == expected
