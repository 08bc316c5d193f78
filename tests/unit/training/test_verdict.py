"""The judge: who is dead, who hangs, and when nobody is."""

from __future__ import annotations

import dataclasses

import pytest

from berth.training.verdict import DONE, LEFT, LOST, AwakeClock, Beat, Judge, Verdict, behind, dead_ranks, failed_rank, hung_ranks

HOSTS = ["n01", "n01", "n02", "n02"]
END = ". All ranks end; go on from the newest checkpoint with --resume_from_checkpoint"


class World:
    """Four ranks that beat every second and are judged every second; ``dead_after`` 10, ``hung_after`` 100."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.judge = Judge(HOSTS, 10.0, 100.0, 4.0, self.now)
        self.beats = [Beat() for _ in HOSTS]

    def run(self, seconds: int, silent=(), still=(), step: int | None = None) -> Verdict | None:
        for _ in range(seconds):
            self.now += 1.0
            for rank, beat in enumerate(self.beats):
                if rank in silent:
                    continue
                moves = beat.moves + (rank not in still)
                new = beat.step + 1 if step is None and rank not in still else beat.step
                self.beats[rank] = dataclasses.replace(beat, count=beat.count + 1, moves=moves, step=new)
            verdict = self.judge.look(self.beats, self.now)
            if verdict:
                return verdict
        return None

    def set(self, rank: int, **changes) -> None:
        self.beats[rank] = dataclasses.replace(self.beats[rank], **changes)


def test_a_healthy_world_is_left_alone():
    assert World().run(500) is None


def test_a_silent_rank_is_dead_after_the_stated_time_and_no_sooner():
    world = World()
    world.run(5)
    world.set(2, doing="backward")
    assert world.run(9, silent=[2]) is None
    verdict = world.run(1, silent=[2])
    assert verdict == Verdict(
        (2,), "rank 2 on host n02 (last seen at step 5, backward) has not been heard of for 10 s; it was killed or stopped, or the node is gone" + END, 76
    )  # fmt: skip


def test_a_rank_that_is_late_with_its_first_beat_has_longer():
    world = World()
    assert world.run(99, silent=[3]) is None
    assert world.run(1, silent=[3]).ranks == (3,)


def test_a_whole_node():
    verdict = World()
    verdict.run(5)
    found = verdict.run(20, silent=[2, 3])
    assert found.ranks == (2, 3) and found.text.startswith(
        "ranks 2 and 3 on host n02 (last seen at step 5, starting) have not been heard of for 10 s"
    )


def test_ranks_that_have_ended_are_not_missed():
    world = World()
    world.run(5)
    world.set(1, state=DONE)
    world.set(3, state=LEFT)
    assert world.run(300, silent=[1, 3]) is None


def test_a_hiccup_shorter_than_the_limit_is_forgiven_each_time():
    world = World()
    for _ in range(20):
        assert world.run(9, silent=[1]) is None
        assert world.run(1) is None


def test_after_the_judge_itself_was_stopped_the_others_silence_starts_anew():
    world = World()
    world.run(5)
    world.now += 3600.0  # a suspended computer: nobody beat meanwhile
    assert world.judge.look(world.beats, world.now) is None
    assert world.run(5, silent=[0, 1, 2, 3]) is None  # others wake up a little later
    assert world.run(100) is None


def test_clocks_only_go_forward():
    clock = AwakeClock(4.0, 100.0)
    assert [clock.tick(now) for now in (101.0, 103.0, 1000.0, 990.0, 991.0)] == [1.0, 3.0, 7.0, 7.0, 8.0]


def test_ranks_that_wait_for_one_that_moves_are_not_hung():
    """Rank 0 evaluates for an hour, saying so, while the others wait for it."""
    world = World()
    world.run(5)
    assert world.run(3600, still=[1, 2, 3], step=5) is None


def test_a_healthy_run_that_calls_progress_rarely_is_left_alone():
    """Only one rank moves on, once in 99 of the 100 seconds that it has; a start stage and a micro-batch may take so long."""
    world = World()
    world.run(1)
    for turn in range(20):
        assert world.run(98, still=range(4)) is None
        assert world.run(1, still=[rank for rank in range(4) if rank != turn % 4]) is None
    assert world.run(100, still=range(4)) is not None


def test_a_rank_that_stands_still_while_the_others_wait_hangs():
    world = World()
    world.run(5)
    for rank in range(4):
        world.set(rank, doing="reading data" if rank == 1 else "waiting for the others", moves=50)
    world.run(1, still=range(4))  # they moved for the last time
    assert world.run(99, still=range(4)) is None
    verdict = world.run(1, still=range(4))
    assert verdict.ranks == (1,)
    assert verdict.text == "rank 1 on host n01 (last seen at step 5, reading data) hangs: it has not moved on for 100 s" + END


def test_the_others_hear_a_little_later_that_the_wait_is_over():
    """Rank 0's beat says step 6 already, those of the others still say step 5, at which they waited for an hour."""
    world = World()
    world.run(5)
    world.run(3600, still=[1, 2, 3], step=5)
    world.set(0, step=6)
    assert world.run(3, still=[1, 2, 3], step=6) is None


def test_a_rank_whose_collective_failed_is_heard_but_not_judged_for_progress():
    world = World()
    world.run(5)
    for rank in (0, 1, 2):
        world.set(rank, state=LOST)
    assert world.run(98, still=range(4)) is None
    assert world.run(5, still=range(4)).ranks == (3,)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([(5, "step"), (5, "step"), (5, "step")], [0, 1, 2]),
        ([(5, "step"), (4, "step"), (5, "step")], [1]),
        ([(5, "waiting for the others"), (5, "waiting for the others"), (5, "step")], [2]),
        ([(5, "waiting for the others"), (5, "reading data")], [1]),
        ([(5, "step"), (5, "checkpoint"), (5, "step")], [1]),
        ([(5, "step"), (5, "checkpoint")], [0, 1]),
        ([(4, "waiting"), (5, "waiting")], [0]),
    ],
)
def test_who_is_behind(positions, expected):
    assert behind(range(len(positions)), [Beat(9, step, doing) for step, doing in positions]) == expected


def test_what_is_written_is_read():
    beat = Beat(7, 3, 'doing "this"', 4, LOST)
    assert Beat.decode(beat.encode().encode()) == beat
    for verdict in (
        failed_rank(3, "n02", "DataError: \n'ő'", 1),
        dead_ranks([0, 2], [Beat()] * 4, HOSTS, 60.0),
        hung_ranks([1], [Beat()] * 4, HOSTS, 1800.0),
    ):
        assert Verdict.decode(verdict.encode().encode()) == verdict
    assert failed_rank(3, "n02", "no", 1) == Verdict((3,), "rank 3 on host n02 failed: no", 1)


def test_many_ranks_make_a_short_sentence():
    hosts = [f"n{rank:04d}" for rank in range(1000)]
    text = dead_ranks(range(1000), [Beat(1, rank) for rank in range(1000)], hosts, 60.0).text
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 more on hosts n0000, " in text and len(text) < 700
