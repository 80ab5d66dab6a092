"""답을 기다리는 줄: 받은 차례대로 하나씩 만든다. 모델을 함께 쓰는 이들이 줄도 함께 서고, 줄의 길이에는 끝이 있다."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

from utils.errors import UsageError

WAITING = 8
REFRESH = 0.04  # 화면을 고치는 간격(초). 이보다 빨라도 눈에는 같다


class Busy(UsageError):
    """기다리는 줄이 가득 찼다."""


class Job(Protocol):
    """줄이 아는 답의 모습(`utils.talk.answerer.Answer`)."""

    ids: list[int]
    stop: threading.Event
    finish_reason: str | None
    error: str
    session: str
    cleared: bool


class Task(NamedTuple):
    """줄에 세운 일: 답을 끝까지 만드는 함수와 그 답."""

    make: Callable[[Job], None]
    job: Job


class Line:
    """작업 스레드 하나가 앞에서부터 만드는 줄. 여러 스레드가 함께 불러도 된다.

    Args:
        say: 작업 스레드의 오류를 알릴 곳.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Task, ...]] = deque()  # 맨 앞은 지금 하고 있는 일이다
        threading.Thread(target=self._work, name="answerer", daemon=True).start()

    def submit(self, *tasks: Task) -> None:
        """일들을 줄 끝에 세운다. 함께 세운 것은 잇달아 만든다.

        Raises:
            Busy: 이미 여덟이 기다리고 있다.
        """
        with self._changed:
            if len(self._waiting) > WAITING:
                raise Busy(f"지금은 바쁘다. 이미 {WAITING}개의 질문이 기다리고 있다. 잠시 뒤에 다시 묻는다")
            self._waiting.append(tasks)
            self._changed.notify()

    def ahead(self, job: Job) -> int:
        """이 답보다 먼저 만들 일의 수."""
        for place, group in enumerate(list(self._waiting)):
            if any(task.job is job for task in group):
                return place
        return 0

    def leave(self, session: str, clear: bool = False) -> None:
        """브라우저가 멈춤을 눌렀거나 떠났거나(`clear`면) 화면을 지웠다. 그가 물은 답을 모두 멈춘다."""
        for group in list(self._waiting):
            for task in group:
                if session and task.job.session == session:
                    task.job.cleared = task.job.cleared or clear
                    task.job.stop.set()

    async def follow(self, *jobs: Job) -> AsyncIterator[int]:
        """답들이 바뀔 때마다 앞에 남은 일의 수를 내놓고, 다 되거나 지워지면 끝난다. 그만 따라가면 답도 멈춘다."""
        seen = None
        try:
            while not jobs[0].cleared:
                done = all(job.finish_reason for job in jobs)
                state = [len(job.ids) for job in jobs], self.ahead(jobs[0]), done
                if state != seen:
                    seen = state
                    yield state[1]
                if done:
                    return
                await asyncio.sleep(REFRESH)
        finally:
            for job in jobs:
                job.stop.set()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                group = self._waiting[0]
            for task in group:
                self._finish(task)
            with self._changed:
                self._waiting.popleft()

    def _finish(self, task: Task) -> None:
        """답 하나를 끝까지 만든다. 무엇이 잘못되어도 그 답만 끝난다."""
        job = task.job
        try:
            task.make(job)
        except UsageError as error:
            job.error, job.finish_reason = str(error), "error"
        except Exception as error:
            self._say(f"답을 만들다 오류가 났다: {type(error).__name__}: {error}")
            job.error = "답을 만들다 오류가 났다. 다시 묻는다. 자세한 것은 프로그램을 실행한 콘솔에 있다"
            job.finish_reason = "error"
