"""Reinforcement learning with the engines ahead of the ranks: they generate the next steps while this one is trained.

``RLTrainer.fit`` is still the whole story. Only two of its verbs differ: ``generate`` hands out what was begun earlier
and begins what comes next, in a thread; ``push`` puts new weights under responses that are under way.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from megarl.config import RunConfig
from megarl.trainer.rl import RLTrainer
from megarl.trainer.run import Run
from megarl.trainer.sampler import Rollout
from megarl.types import Placement

_POLL_S = 1.0  # between looks at engines that the thread found dead


class PipelinedTrainer(RLTrainer):
    """No sample is of weights more than ``trainer.max_staleness`` optimizer steps older than those that learn from it.

    A sync pauses the engines, and responses go on with the new weights (``RunConfig.partial_rollouts``); each action
    keeps the log-prob and the version of the weights that chose it. The loss has the ratio to the policy at the start
    of the step, as ever, and ``algorithm.rollout_correction`` weighs it by the ratio from there to what was sampled
    from; with ``algorithm.bypass_old_logprobs`` the one ratio is to that. A checkpoint holds the place in the prompts
    behind the last trained step: those under way are drawn again.
    """

    def __init__(self, config: RunConfig, run: Run, placement: Placement) -> None:
        super().__init__(config, run, placement)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")  # one: steps draw their prompts in order
        self.ahead: dict[int, Future[Rollout]] = {}  # by step

    def generate(self, step: int) -> Rollout:
        """The samples of ``step``. The rollouts of the next steps are started."""
        self._begin(step)
        with self.run.timer("wait_gen"):
            self._wait_for([self.ahead[step]])
        rollout = self.ahead.pop(step).result()
        last = min(step + self.config.trainer.max_staleness, self.config.trainer.num_steps)
        for later in range(step + 1, last + 1):
            if not self.run.stopping:
                self._begin(later)
        return rollout

    def push(self, *, must_change: bool) -> dict[str, float]:
        """Sync all engines, amid their responses where those may go on with other weights."""
        if not self.config.partial_rollouts:
            with self.run.timer("finish_gen"):
                self._wait_for(self.ahead.values())
        return super().push(must_change=must_change)

    def close(self) -> None:
        """End the engines, the reward processes, the ranks and with them the thread."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        super().close()
        self.thread.shutdown()

    def _begin(self, step: int) -> None:
        if step not in self.ahead:
            progress = partial(self.run.console.progress, "generate")
            self.ahead[step] = self.thread.submit(self.sampler.sample, step, progress)

    def _wait_for(self, rollouts: Iterable[Future[Rollout]]) -> None:
        """Return when ``rollouts`` are finished; engines that die meanwhile are replaced by this thread."""
        pending = set(rollouts)
        while pending:
            pending = wait(pending, timeout=_POLL_S).not_done
            self.rollout.replace_lost()
