"""A DataModule over others that stays, for Lightning, the module and the user, what those others are."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_cl.datamodules.base_data import BaseData

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_ANSWERED_HOOKS = ("val_dataloader", "test_dataloader", "predict_dataloader", *_TRANSFER_HOOKS)


class DelegatingDataModule(LightningDataModule):
    """Pass hooks and attributes on to the DataModules behind it.

    Lightning asks whether a hook is overridden and decides by the answer: whether to validate, whose transfer hooks to
    call. So this offers a hook only if a base does.

    Args:
        modules: The DataModules.
        val_fraction: See `BaseData`.
        eval_transform: See `BaseData`.
    """

    def __init__(
        self,
        modules: Sequence[LightningDataModule],
        val_fraction: float | None,
        eval_transform: Callable[..., Any] | None,
    ) -> None:
        super().__init__()
        self._bases = [BaseData(module, val_fraction, eval_transform) for module in modules]
        self.prepare_data_per_node = self._bases[0].module.prepare_data_per_node
        self._answer_for_bases()

    def spokesman(self) -> BaseData:
        """Return the base whose attributes are looked up."""
        return self._bases[0]

    def pass_on(self, hook: str) -> None:
        """Put the base's own hook in the place of this module's."""
        setattr(self, hook, getattr(self._bases[0].module, hook))

    @property
    @override
    def trainer(self) -> Trainer | None:
        """The Trainer, which the bases have too."""
        return self.__dict__.get("_trainer")

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.__dict__["_trainer"] = trainer
        for base in self.__dict__.get("_bases", ()):
            base.module.trainer = trainer

    @override
    def prepare_data(self) -> None:
        for base in self._bases:
            base.module.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        for base in self._bases:
            base.forget()
            base.setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        for base in self._bases:
            base.module.teardown(stage)
            base.forget()

    @override
    def on_exception(self, exception: BaseException) -> None:
        for base in self._bases:
            base.module.on_exception(exception)

    @override
    def predict_dataloader(self) -> Any:
        return self._bases[0].module.predict_dataloader()

    def __getattr__(self, name: str) -> Any:
        """Look up on the base what is not here."""
        if not self.__dict__.get("_bases") or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.spokesman().module, name)

    def __getstate__(self) -> dict[str, Any]:
        # unpickled, these would come back as the methods of the class
        return {name: value for name, value in self.__dict__.items() if name not in _ANSWERED_HOOKS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._answer_for_bases()

    def _answer_for_bases(self) -> None:
        if not any(base.has_val for base in self._bases):
            self._hide("val_dataloader")
        for hook in ("test_dataloader", "predict_dataloader"):
            if not self._bases_have(hook):
                self._hide(hook)
        for hook in _TRANSFER_HOOKS:
            if self._bases_have(hook):
                self.pass_on(hook)

    def _bases_have(self, hook: str) -> bool:
        return any(is_overridden(hook, base.module, LightningDataModule) for base in self._bases)

    def _hide(self, hook: str) -> None:
        setattr(self, hook, MethodType(getattr(LightningDataModule, hook), self))
