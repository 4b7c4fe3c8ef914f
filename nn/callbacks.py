"""What is done around the steps of an optimizer, in a plain loop or under the Trainer of transformers.

loss.backward()
callback.before_step()
optimizer.step()
callback.step()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Callback(ABC):
    """Something that happens around every step of an optimizer.

    Attributes:
        count: how many steps are done. To go on with a training that was saved, ``seek`` it.
    """

    count: int = 0

    def before_step(self) -> None:  # noqa: B027
        """Between ``backward`` and the step: gradients may be changed here."""

    def step(self) -> None:
        """After the step of the optimizer."""
        self.count += 1
        self.after_step()

    @abstractmethod
    def after_step(self) -> None:
        """What is done after step ``count``."""

    def seek(self, count: int) -> None:
        """Go on as after step ``count``."""
        self.count = count


def trainer_callback(*callbacks: Callback) -> Any:
    """The callbacks as one ``transformers.TrainerCallback``; one step is one step of the Trainer's optimizer.

    Example: ``Trainer(model, …, callbacks=[trainer_callback(SelfGuidance(model, steps=1000))])``
    """
    from transformers import TrainerCallback

    class Around(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for callback in callbacks:
                callback.seek(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for callback in callbacks:
                callback.before_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for callback in callbacks:
                callback.step()

    return Around()
