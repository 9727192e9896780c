"""Measures sampling, and steps of SFT and GRPO written by hand, with models of `transformers`."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import peers_tuning
from bench.cases import COMPARED, Example
from bench.peers_model import (
    DEVICE,
    IGNORED,
    Policy,
    Prompts,
    count_flops,
    load_network,
    prefilled,
    token_types,
)
from bench.task import Numbers

BETA, CLIP_LOW, CLIP_HIGH = 0.04, 0.2, 0.28
GRPO_LR, MAX_NORM = 1e-6, 1.0
_SFT_LR = 1e-5


class Measured(abc.ABC):
    """The parts of `task.Task` that all tasks share."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @functools.cached_property
    def flops(self) -> float | None:
        flops = count_flops(self.compute)
        self.policy.network.zero_grad()
        return flops

    @abc.abstractmethod
    def compute(self) -> Any:
        """Does all of a run but the optimizer's step."""

    def prepare(self) -> None:
        self.run()

    def run(self) -> None:
        self.compute()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def numbers(self) -> Numbers:
        return {}


class Trained(Measured):
    """A task whose run ends with an update.

    Args:
        lr: AdamW's learning rate.
    """

    def __init__(self, policy: Policy, lr: float) -> None:
        super().__init__(policy)
        self._lr = lr

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.policy.optimizer(self._lr)

    def prepare(self) -> None:
        """Runs once, and sets the parameters back, for `numbers`."""
        parameters = list(self.policy.network.parameters())
        copies = [parameter.detach().clone() for parameter in parameters]
        self.run()
        with torch.no_grad():
            for parameter, before in zip(parameters, copies, strict=True):
                parameter.copy_(before)

    def run(self) -> None:
        self.compute()
        self._norm()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def _numbers(self, loss: Tensor) -> Numbers:
        """Returns the numbers of a step whose gradients were just computed, and drops those."""
        numbers = {"loss": float(loss), "grad_norm": float(self._norm())}
        self.policy.network.zero_grad()
        return numbers

    def _norm(self) -> Tensor:
        """Clips the gradients and returns their global norm before."""
        return torch.nn.utils.clip_grad_norm_(self.policy.network.parameters(), MAX_NORM)


class SFTTask(Trained):
    """A step of SFT; the loss is the mean over all target tokens."""

    def __init__(self, policy: Policy, examples: list[Example]) -> None:
        super().__init__(policy, _SFT_LR)
        rows = policy.preset.micro
        parts = [examples[i : i + rows] for i in range(0, len(examples), rows)]
        self._parts = [_padded(policy, part) for part in parts]
        self._count = sum(int((part["labels"] != IGNORED).sum()) for part in self._parts)

    def numbers(self) -> Numbers:
        return self._numbers(self.compute())

    def compute(self) -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for part in self._parts:
            loss = self._loss(dict(part))
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, part: dict[str, Tensor]) -> Tensor:
        policy = self.policy
        network = policy.network
        if not policy.form.tuned:
            with policy.autocast():
                return network(**part, num_items_in_batch=self._count, use_cache=False).loss
        labels = part.pop("labels")[:, 1:]
        counted = labels != IGNORED
        with policy.autocast():
            hidden = network.model(**part, use_cache=False).last_hidden_state[:, :-1]
            logits = network.lm_head(hidden[counted])
        return F.cross_entropy(logits.float(), labels[counted], reduction="sum") / self._count


def _padded(policy: Policy, examples: list[Example]) -> dict[str, Tensor]:
    """Returns the model's arguments for a batch, prompt and target in one padded row."""
    tokenizer = policy.processor.tokenizer
    inputs = policy.process([example.prompt for example in examples])
    masked_rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    prompts = [row[mask] for row, mask in masked_rows]
    end = [tokenizer.eos_token_id]
    targets = [
        torch.tensor(tokenizer(example.target)["input_ids"] + end, device=DEVICE)
        for example in examples
    ]
    rows = [torch.cat(pair) for pair in zip(prompts, targets, strict=True)]
    labels = [
        torch.cat([torch.full_like(prompt, IGNORED), target])
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tokens = pad(rows, padding_value=tokenizer.pad_token_id)
    return inputs | {
        "input_ids": tokens,
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "mm_token_type_ids": token_types(policy.network, tokens),
        "labels": pad(labels, padding_value=IGNORED),
    }


class SampleTask(Measured):
    """Samples a group of completions for each prompt, all of the full length.

    Args:
        prompt, completion: lengths in tokens.
    """

    def __init__(self, policy: Policy, prompt: int, completion: int) -> None:
        super().__init__(policy)
        self._prompts, self._length = policy.prompts(prompt), completion

    def numbers(self) -> Numbers:
        return {"tokens": self.policy.generate(self._prompts, 1, 32, greedy=True).tolist()}

    def compute(self) -> None:
        self.policy.generate(self._prompts, self.policy.preset.group, self._length)


class TailTask(SampleTask):
    """Samples completions that end when they end, by `generate`, which waits for the longest."""

    def __init__(self, policy: Policy, prompt: int) -> None:
        tail = policy.preset.tail
        super().__init__(policy, prompt, tail.limit)
        self._prompts = policy.prompts(prompt, tail.batch)
        self._ends = tail.ends(policy.forbidden.allowed)

    def numbers(self) -> Numbers:
        drawn = self.policy.generate(self._prompts, 1, COMPARED, greedy=True, ends=self._ends)
        return {"tokens": [self._whole(row) for row in drawn.tolist()]}

    def _whole(self, tokens: list[int]) -> list[int]:
        """Returns a completion without what follows its end."""
        ends = (place for place, token in enumerate(tokens) if token in self._ends)
        return tokens[: next(ends, len(tokens) - 1) + 1]

    def compute(self) -> None:
        group = self.policy.preset.group
        self.policy.generate(self._prompts, group, self._length, ends=self._ends)


class DroppingTask(TailTask):
    """The same by a loop of its own: prompts run once, and samples that have ended are dropped.

    Dropping copies the cache, so it waits until a tenth of the rows have ended.
    """

    def numbers(self) -> Numbers:
        rows = self._decode(group=1, length=COMPARED, ends=self._ends, greedy=True)
        return {"tokens": [tokens.tolist() for tokens in rows]}

    def compute(self) -> None:
        self._decode(self.policy.preset.group, self._length, self._ends)

    @torch.no_grad()
    def _decode(
        self, group: int, length: int, ends: list[int], greedy: bool = False
    ) -> list[Tensor]:
        """Returns the completions, `group` for each prompt."""
        policy, network = self.policy, self.policy.network
        with policy.autocast():
            given = prefilled(network, self._prompts, group, length)
            cache, last = given["past_key_values"], given["input_ids"][:, -1:]
            end_ids = torch.tensor(ends, device=DEVICE)
            drawn = last.new_zeros(len(last), length)
            lengths = last.new_full((len(last),), length)
            rows = torch.arange(len(last), device=DEVICE)  # the sample in each row of the cache
            is_open = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
            for place in range(length):
                logits = network(input_ids=last, past_key_values=cache, use_cache=True).logits
                logits = policy.forbidden(last, logits[:, -1].float())
                if greedy:
                    last = logits.argmax(-1, keepdim=True)
                else:
                    last = torch.multinomial(logits.softmax(-1), 1)
                drawn[rows, place] = last[:, 0]
                ended = is_open & torch.isin(last[:, 0], end_ids)
                lengths[rows[ended]] = place + 1
                is_open &= ~ended
                left = int(is_open.sum())
                if not left:
                    break
                if left <= 0.9 * len(rows):
                    peers_tuning.keep_rows(cache, is_open)
                    network.model.rope_deltas = network.model.rope_deltas[is_open]
                    last, rows, is_open = last[is_open], rows[is_open], is_open[is_open]
        return [tokens[:n] for tokens, n in zip(drawn, lengths.tolist(), strict=True)]


class Rollout(NamedTuple):
    """Completions of prompts, in the prompts' order.

    Attributes:
        rows: the prompt of each, int64 [n].
        completions: int64 [n, t].
        advantages: float32 [n].
    """

    rows: Tensor
    completions: Tensor
    advantages: Tensor

    def parts(self, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields `size` completions at a time: their places, prompts and tokens."""
        for start in range(0, len(self.rows), size):
            places = slice(start, start + size)
            yield places, self.rows[places], self.completions[places]


def _random_rollout(policy: Policy, group: int) -> Rollout:
    """Returns random completions, the same on both sides."""
    completions, advantages = (
        torch.as_tensor(x, device=DEVICE).flatten(0, 1) for x in policy.inputs.rollout(group)
    )
    rows = torch.arange(len(completions), device=DEVICE) // group
    return Rollout(rows, completions, advantages)


class UpdateTask(Trained):
    """An update alone, on `group` random completions of each prompt."""

    def __init__(self, policy: Policy, length: int, group: int) -> None:
        super().__init__(policy, GRPO_LR)
        self._prompts = policy.prompts(length)
        self._rollout = _random_rollout(policy, group)

    def numbers(self) -> Numbers:
        return self._numbers(self.compute())

    def compute(self) -> Tensor:
        return backward(self.policy, self._prompts, self._rollout, None)


class GRPOTask(Trained):
    """A step of GRPO with KL: samples, the reference's log-probabilities, an update."""

    def __init__(self, policy: Policy, length: int) -> None:
        super().__init__(policy, GRPO_LR)
        self._length = length
        self._prompts = policy.prompts(length)

    @functools.cached_property
    def _reference(self) -> torch.nn.Module:
        policy = self.policy
        return load_network(policy.folder, policy.form, policy.dtype)

    def numbers(self) -> Numbers:
        """Returns an update's numbers on TRL's rollout, if it is in the folder, or a random one."""
        policy = self.policy
        path = rollout_path(policy.folder, self._length)
        rollout = _random_rollout(policy, policy.preset.group)
        if path.exists():
            trl_rollout = np.load(path)
            rollout = rollout._replace(
                completions=torch.as_tensor(trl_rollout["completion_ids"], device=DEVICE).long(),
                advantages=torch.as_tensor(trl_rollout["advantages"], device=DEVICE),
            )
        return self._numbers(
            backward(policy, self._prompts, rollout, self._reference_logprobs(rollout))
        )

    def compute(self) -> None:
        rollout = self._sample()
        backward(self.policy, self._prompts, rollout, self._reference_logprobs(rollout))

    def _sample(self) -> Rollout:
        """Samples completions and takes their advantages."""
        policy, preset = self.policy, self.policy.preset
        completions = policy.generate(self._prompts, preset.group, preset.completion)
        rewards = torch.tensor([reward(row) for row in completions.tolist()], device=DEVICE)
        groups = rewards.view(-1, preset.group)
        advantages = (groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)
        rows = torch.arange(len(completions), device=DEVICE) // preset.group
        return Rollout(rows, completions, advantages.flatten())

    @torch.no_grad()
    def _reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Returns the reference's log-probabilities of a rollout, float32 [n, t]."""
        policy, parts = self.policy, rollout.parts(self.policy.preset.micro)
        return torch.cat(
            [policy.logprobs(self._reference, self._prompts, *part) for _, *part in parts]
        )


def backward(
    policy: Policy, prompts: Prompts, rollout: Rollout, reference: Tensor | None
) -> Tensor:
    """Adds the gradients of GRPO's loss, the mean over all tokens, and returns the loss.

    A first update is on-policy: the old log-probabilities are those of the update itself.

    Args:
        policy: its parameters get the gradients.
        prompts: of the rollout.
        reference: the reference's log-probabilities, float32 [n, t]; None: no KL.
    """
    total = torch.zeros((), device=DEVICE)
    for places, rows, completions in rollout.parts(policy.preset.micro):
        logps = policy.logprobs(policy.network, prompts, rows, completions)
        advantages = rollout.advantages[places, None]
        ratio = (logps - logps.detach()).exp()
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        if reference is not None:
            log_ratio = reference[places] - logps
            loss = loss + BETA * (log_ratio.exp() - log_ratio - 1)
        loss = loss.sum() / rollout.completions.numel()
        loss.backward()
        total += loss.detach()
    return total


def reward(tokens: list[int]) -> float:
    """Returns a reward that is cheap to compute and differs between most completions."""
    return sum(tokens) % 97 / 97


def rollout_path(folder: Path, length: int) -> Path:
    """Returns the file that TRL's rollout is written to, for other sides to compute with."""
    return folder / f"rollouts-{length}.npz"
