"""Build the datasets before the model, so that invalid data end a run before weights are initialized or loaded."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.training import get_args
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

from megatron_vlbridge.checkpoint.live.collectives import gather, long_wait
from megatron_vlbridge.errors import VLBridgeError

_NAMES = ("training", "validation", "test")


class EagerDatasetProvider:
    """A Megatron dataset provider whose datasets can be built before Megatron requests them.

    `provider(train_valid_test_num_samples)` gives three datasets, each of which may be `None`; with virtual pipeline
    stages it also takes `vp_stage`. As in Megatron, it is called on the first rank of each tensor-parallel group, or on
    all ranks if it has the attribute `is_distributed`.
    """

    def __init__(self, provider: Callable[..., Any]) -> None:
        self.provider = provider
        self.is_distributed = bool(getattr(provider, "is_distributed", False))
        self._datasets: dict[int | None, Any] | None = None
        self.training: Any = None
        """The training dataset of the rank's first stage, once it is built; None where the rank has none."""

    def build(self) -> None:
        """Build all datasets, once; needs the process groups and Megatron's global arguments.

        It may take longer than `--distributed-timeout-minutes`: the ranks that build nothing wait for the others.

        Raises VLBridgeError: the provider fails on any rank, or its datasets are too small; the same error on all
        ranks.
        """
        args = get_args()
        if self._datasets is not None or args.phase_transition_iterations:
            # The number of samples of a phase depends on the checkpoint, which is loaded after the model is built.
            return
        self._datasets, failure, cause = {}, None, None
        with long_wait() as group:
            try:
                if self.is_distributed or parallel_state.get_tensor_model_parallel_rank() == 0:
                    self._build(args)
            except Exception as error:  # noqa: BLE001  the other ranks wait for the gather: they must receive any failure
                cause = error
                failure = f"the dataset provider failed with {type(error).__name__}: {error}"
                if isinstance(error, VLBridgeError):
                    failure = str(error)
            failures = [text for text in gather(failure, group) if text is not None]
        if failures:
            raise VLBridgeError(failures[0]) from cause
        # Megatron decides on the first rank whether to evaluate.
        if not gather(any(validation is not None for _, validation, _ in self._datasets.values()))[0]:
            args.eval_iters = 0

    def __call__(self, train_valid_test_num_samples: Sequence[int], vp_stage: int | None = None) -> Any:
        """Called by Megatron on the ranks on which the datasets were built."""
        if self._datasets:
            return self._datasets.pop(vp_stage)
        return self._call(train_valid_test_num_samples, vp_stage)

    def _build(self, args: Any) -> None:
        chunks = args.virtual_pipeline_model_parallel_size
        if chunks and "vp_stage" not in inspect.signature(self.provider).parameters:
            raise VLBridgeError("virtual pipeline stages need a dataset provider with an argument vp_stage")
        # What Megatron will request; with --train-samples, it derives the iterations only after building the model.
        given = args.train_iters
        update_train_iters(args)
        counts: Sequence[int] = get_train_valid_test_num_samples()
        args.train_iters = given
        for stage in range(chunks) if chunks else [None]:
            datasets = self._call(counts, stage)
            _check(datasets, counts, args)
            if not stage:
                self.training = datasets[0]
            assert self._datasets is not None
            self._datasets[stage] = datasets

    def _call(self, counts: Sequence[int], stage: int | None) -> Any:
        return self.provider(counts) if stage is None else self.provider(counts, vp_stage=stage)


def _check(datasets: Any, counts: Sequence[int | None], args: Any) -> None:
    """Reject datasets with which Megatron would not train, or would stop early."""
    train, validation, test = datasets
    if train is None and not args.skip_train:
        raise VLBridgeError("the dataset provider returned no training dataset, expected (training, validation, test)")
    if validation is None and test is not None and args.eval_iters:
        raise VLBridgeError(
            "the dataset provider returned a test dataset without a validation dataset; return both or neither"
        )
    if args.dataloader_type != "single":
        return
    for name, dataset, count in zip(_NAMES, (train, validation, test), counts, strict=True):
        if count is not None and hasattr(dataset, "__len__") and len(dataset) < count:
            raise VLBridgeError(
                f"the {name} dataset has {len(dataset)} packs, expected at least {count}, the number of samples passed "
                "to the dataset provider (iterations x global batch size)"
            )
