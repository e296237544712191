"""From a loaded model to a runner that is ready.

    the kernels, checked ─▶ the largest step, tried ─▶ the pool, in what that leaves ─▶ all steps, recorded

What does not work is done without, and noted; so the page runs on any GPU, and on none.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from chatpage.errors import ModelError, SettingError
from chatpage.model.kv import CPU_SEQUENCES, Budget, Wish, bytes_per_block, free_memory, lacks_memory, mib, size_pool
from chatpage.model.load import LoadedModel
from chatpage.model.step import ModelRunner
from chatpage.settings import Settings

log = logging.getLogger(__name__)

ALLOCATION = 2**21  # bytes of which a GPU's allocations are multiples
FOUND_AGAIN = 0.95  # of a GPU's free memory


class Startup:
    """Makes the runner.

    Args:
        say: is told, in a few words, how far it is.
        shortest: tokens of a context that is worth having.

    Attributes:
        runner: it has its pool, and is as fast as it can be.
        max_model_len: tokens that a sequence can have.
        notes: sentences that whoever runs the page should read.

    Raises:
        SettingError: a setting cannot be obeyed; the message says which could.
        ModelError: the model leaves no memory for a step.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, say: Callable[[str], None], *, shortest: int) -> None:
        self._loaded = loaded
        self._settings = settings
        self._say = say
        self._shortest = shortest
        self._is_gpu = loaded.device.type == "cuda"
        self.notes: list[str] = []
        self._require_possible()
        self.runner = ModelRunner(loaded, num_blocks=1, block_size=settings.block_size, max_rows=settings.max_sequences)
        has_kernels = self._records = self._use_kernels()
        self.max_model_len = self._make_pool()
        if self._records:
            self._record_steps()
        if has_kernels and not self._records:
            self._say("Compiling the attention kernels")
            self.runner.compile_steps(max_context=self.max_model_len)

    def _require_possible(self) -> None:
        longest, allowed = self._settings.max_model_len, self._loaded.max_positions
        if longest and longest > allowed:
            raise SettingError(f"--max-model-len is {longest}, but this model's contexts end at {allowed} tokens.")
        if self._settings.attention == "triton" and not self._is_gpu:
            raise SettingError("--attention is triton, which needs a CUDA GPU; use auto or reference.")

    # -- the kernels ----------------------------------------------------------------------------------------------

    def _use_kernels(self) -> bool:
        """Whether they work here, and may be used."""
        wish = self._settings.attention
        if wish == "reference" or not self._is_gpu:
            return False
        self._say("Compiling the attention kernels")
        try:
            self.runner.use_kernels()
        except Exception as error:
            log.info("The kernels do not work here", exc_info=True)
            if wish == "triton":
                raise SettingError(f"--attention is triton, but {_sentence(error)}; use auto or reference.") from error
            self.notes.append(f"Attention is computed by plain PyTorch, which is slow: {_sentence(error)}.")
            return False
        return True

    def _record_steps(self) -> None:
        settings = self._settings
        max_blocks = -(-self.max_model_len // settings.block_size)
        try:
            self.runner.record_steps(max_tokens=settings.max_step_tokens, max_blocks=max_blocks, say=self._say)
        except Exception as error:
            self._note_unrecorded(error)

    def _note_unrecorded(self, error: Exception) -> None:
        log.info("Steps cannot be recorded", exc_info=True)
        self.notes.append(f"This model's steps cannot be recorded as graphs, so they are slow: {_sentence(error)}.")
        self._records = False

    # -- the pool -------------------------------------------------------------------------------------------------

    def _make_pool(self) -> int:
        """Give the runner its pool. Returns how many tokens a sequence can have."""
        budget = self._try_step()
        num_blocks, longest = self._size_pool(budget)
        if self._settings.max_model_len is None and longest < self._loaded.max_positions:
            self.notes.append(
                f"Contexts end at {longest} tokens: the free memory holds no more "
                f"(the model knows {self._loaded.max_positions})."
            )
        try:
            self.runner.resize(num_blocks)
        except Exception as error:
            if not lacks_memory(error):
                raise
            raise self._pool_too_large(budget, num_blocks) from error
        return longest

    def _size_pool(self, budget: Budget) -> tuple[int, int]:
        try:
            return size_pool(budget, self._wish)
        except SettingError:
            if self._is_gpu:  # what is advised must fit at the next start too, which may find a little less
                size_pool(replace(budget, free=int(budget.free * FOUND_AGAIN)), self._wish)
            raise

    def _pool_too_large(self, budget: Budget, num_blocks: int) -> SettingError:
        """Something else has taken memory since it was counted, or what is free is in pieces."""
        now = replace(budget, free=free_memory(self._loaded.device))
        fewer, _ = size_pool(now, replace(self._wish, kv_blocks=None))
        return SettingError(
            f"--kv-blocks is {num_blocks}, but so many blocks of {budget.bytes_per_block} bytes could not be "
            f"allocated: use --kv-blocks {min(fewer, num_blocks * 9 // 10)}."
        )

    @property
    def _wish(self) -> Wish:
        settings = self._settings
        return Wish(
            kv_blocks=settings.kv_blocks,
            max_model_len=settings.max_model_len,
            max_positions=self._loaded.max_positions,
            sequences=settings.max_sequences if self._is_gpu else min(settings.max_sequences, CPU_SEQUENCES),
            block_size=settings.block_size,
            shortest=self._shortest,
        )

    def _try_step(self) -> Budget:
        """What memory there is beside the largest step."""
        tokens = self._settings.max_step_tokens
        if self._is_gpu:
            self._say("Trying the largest step")
        budget = self._budget(tokens)
        if budget is None:
            raise self._step_too_large(tokens)
        return budget

    def _budget(self, tokens: int) -> Budget | None:
        """What memory there is beside a step of so many tokens; None where there is not even enough for that."""
        loaded, settings = self._loaded, self._settings
        try:
            step = self._measure_step(tokens)
        except Exception as error:
            if not lacks_memory(error):
                raise
            return None
        rounding = len(self.runner.pool.tensors) * ALLOCATION if self._is_gpu else 0
        block_bytes = bytes_per_block(loaded.layers, settings.block_size, loaded.dtype)
        return Budget(free_memory(loaded.device), step + rounding, settings.kv_memory, block_bytes)

    def _measure_step(self, tokens: int) -> int:
        longest = self._settings.max_model_len or self._loaded.max_positions
        try:
            return self.runner.measure_step(max_tokens=tokens, max_context=longest, recorded=self._records)
        except Exception as error:
            if lacks_memory(error) or not self._records:
                raise
            self._note_unrecorded(error)
        return self.runner.measure_step(max_tokens=tokens, max_context=longest, recorded=False)

    def _step_too_large(self, tokens: int) -> SettingError | ModelError:
        """Says how large steps can be, which is tried."""
        free = mib(free_memory(self._loaded.device))
        fewer = tokens // 2
        while fewer and not self._is_room_beside(fewer):
            fewer //= 2
        if fewer:
            return SettingError(
                f"--max-step-tokens is {tokens}, but a step of so many tokens does not fit into the free {free}: "
                f"use --max-step-tokens {fewer}."
            )
        return ModelError(f"the model leaves {free} of memory, which is too little for a step: use a smaller model.")

    def _is_room_beside(self, tokens: int) -> bool:
        """Whether a step of so many tokens fits, and a pool beside it."""
        budget = self._budget(tokens)
        try:
            return budget is not None and bool(size_pool(budget, self._wish))
        except SettingError:
            return False


def _sentence(error: Exception) -> str:
    """The first line of what it says, to be part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
