"""Keep the state of mmengine's EarlyStoppingHook in checkpoints; mmengine itself forgets it on resume."""

from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import Runner

from ..errors import CheckpointError


def early_stopping_of(runner: Runner) -> dict[str, tuple[float, int]]:
    """Best score and count of validations without progress, by the metric that a hook monitors."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
    return {hook.monitor: (float(hook.best_score), hook.wait_count) for hook in hooks}


def restore_early_stopping(runner: Runner) -> None:
    """Restore what :func:`early_stopping_of` noted; end training where the saved run had ended.

    Raises:
        CheckpointError: the state is something else.
    """
    states = runner.message_hub.runtime_info.get('early_stopping')
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook) and isinstance(states, dict) and hook.monitor in states:
            try:
                best_score, wait_count = states[hook.monitor]
                hook.best_score, hook.wait_count = float(best_score), int(wait_count)
            except (TypeError, ValueError):
                raise CheckpointError(
                    f'the checkpoint holds no state of early stopping by {hook.monitor}, but {states[hook.monitor]!r}'
                ) from None
            goal = hook.stopping_threshold
            reached = goal is not None and hook.rule_map[hook.rule](hook.best_score, goal)
            if reached or hook.wait_count >= hook.patience:
                runner.train_loop.stop_training = True
                runner.logger.info(f'RESUME: early stopping by {hook.monitor} had ended this run')
