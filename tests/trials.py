"""What this package makes of a model type: a tiny model of it -> right, right with our loss, or refused in words.

A tiny random model is saved, loaded as `train` loads it, and trained for three steps by the package's own Trainer:
plainly, in accumulated batches, with the fast paths, and from a kept prefix. Each is compared with a loop of plain
PyTorch over the same windows, in which the cross entropy of the next token is written down once more.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Trainer

from partialtune.errors import InputError, RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.model.conformance import CAUSAL_SETTINGS, Conformance, check_conformance
from partialtune.model.loading import auto_class, empty_model, load_config, load_model
from partialtune.model.structure import read_structure
from partialtune.recipe.recipe import recipe_from_values
from partialtune.scoring.evaluation import ScoredText, score_text
from partialtune.scoring.prompts import probe_prompts
from partialtune.training.recipe_trainer import make_trainer, prefix_phases
from partialtune.training.settings import training_arguments
from partialtune.training.training_data import RunData
from partialtune.verify.verify import verify
from tiny_models import tiny_config

STEPS, WINDOWS = 3, 4
STEP = 1e-3  # of the weight that moves most, by SGD: AdamW would move one whose gradient is rounding noise as far
CLOSE = 1e-6  # largest difference of a weight after the steps
BLOCK_SIZES = {"reformer": 64}  # trains on one length alone, which its config says
PART = ("blocks[-1]", "final_norm")


@dataclass(frozen=True)
class Verdict:
    """A row of the table.

    Attributes:
        model_type: As transformers calls it, and a setting of its config where that was changed.
        verdict: `right`, `right with our loss`, `refused: ...`, or `WRONG: ...`.
        parameters, blocks: Of the tiny model.
        prefix: `equal`, or why no prefix is kept.
        notes: What else there is to know.
    """

    model_type: str
    verdict: str
    parameters: int = 0
    blocks: int = 0
    prefix: str = ""
    notes: str = ""


class Wrong(Exception):
    """The package does something else than it says."""


def judge(model_type: str, setting: str = "") -> Verdict:
    """Try a tiny model of a type.

    Args:
        model_type: One of transformers' causal mapping.
        setting: A key of `CAUSAL_SETTINGS` that makes it read from left to right.
    """
    name = f"{model_type}, {setting}: {str(CAUSAL_SETTINGS[setting]).lower()}" if setting else model_type
    with tempfile.TemporaryDirectory() as folder:
        base, count = f"{folder}/base", 0
        try:
            config = tiny_config(model_type)
            if setting:
                setattr(config, setting, CAUSAL_SETTINGS[setting])
            config.save_pretrained(base)
            torch.manual_seed(0)
            model = auto_class(config).from_config(config)
        except Exception as error:  # noqa: BLE001 - transformers' own, which ours has to say in words
            model = error
        try:
            if isinstance(model, Exception):
                empty_model(load_config(base))
                raise model
            model.save_pretrained(base)
            config.save_pretrained(base)  # the whole one, where the model is the text part alone
            count = sum({id(p): p.numel() for p in model.parameters()}.values())
            return _trained(name, model_type, base, count)
        except InputError as error:
            return Verdict(name, f"refused: {_one_line(error)}".replace(base, "BASE"), count)
        except Wrong as error:
            return Verdict(name, f"WRONG: {_one_line(error)}", count)
        except Exception as error:  # noqa: BLE001 - which the package should have said in words
            return Verdict(name, f"WRONG: {type(error).__name__}: {_one_line(error)}", count)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _trained(name: str, model_type: str, base: str, count: int) -> Verdict:
    size, notes = BLOCK_SIZES.get(model_type, 16), []
    part = Trial(base, size, PART)
    if not part.has_final_norm:
        part = Trial(base, size, PART[:1])
        notes.append("no final norm")
    everything = Trial(base, size, ("all",))
    part.check_plan(count)
    everything.check_plan(count)
    part.check_scores()
    part.compare("plain", part.train())
    part.compare("with the fast paths", part.train(fast_paths=["loss", "gelu"]))
    everything.compare("in two accumulated batches", everything.train(accumulation=2))
    everything.compare("in four accumulated batches, with the fast paths", everything.train(["loss", "gelu"], 4))
    try:
        kept = part.train(prefix_cache="memory")
    except RecipeError as error:
        prefix = f"not kept: {_one_line(error).removeprefix('prefix_cache: memory is impossible here: ')}"
        prefix = prefix.removesuffix(" Say prefix_cache: auto.")
    else:
        part.compare("from a kept prefix", kept)
        prefix = "equal"
    notes += [f"loss: {part.conformance.loss_fault}"] if part.conformance.loss_fault else []
    notes += [f"{key} {value} is 0 in the run" for key, value in part.conformance.config_as_loaded.items()]
    verdict = "right with our loss" if part.conformance.loss_fault else "right"
    return Verdict(name, verdict, count, read_structure(part.load()).block_count, prefix, "; ".join(notes))


class Trial:
    """Three steps of one plan on one base, as often as wanted.

    Args:
        base: A folder.
        block_size: Tokens of a window.
        trainable: Selectors.
    """

    def __init__(self, base: str, block_size: int, trainable: Sequence[str]) -> None:
        self.base, self.block_size, self.trainable = base, block_size, list(trainable)
        self.config: PretrainedConfig = load_config(base, dropout=0.0)
        model = self.load()
        self.conformance: Conformance = check_conformance(model, block_size)
        self.before = _weights(model)
        vocabulary = min(model.get_input_embeddings().weight.shape[0], model.config.get_text_config().vocab_size)
        self.ids = torch.from_numpy(np.random.default_rng(0).integers(3, vocabulary, size=(WINDOWS, block_size)))
        self.has_final_norm = any(info.component == "final_norm" for info in read_structure(model).parameters)
        if "final_norm" in trainable and not self.has_final_norm:
            return
        self.plan: FreezePlan = plan_freeze(model, self.trainable)
        self.wanted, self.first_loss = self._plain_loop(model)

    def load(self) -> PreTrainedModel:
        return load_model(self.base, self.config)

    def _plain_loop(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], float]:
        """Weights after the steps, and the loss before the first."""
        apply_plan(model, self.plan)
        model.train()
        torch.manual_seed(42)
        trained = [p for p in model.parameters() if p.requires_grad]
        losses, rate = [], None
        for _ in range(STEPS):
            loss = cross_entropy(model, self.ids)
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            rate = rate or STEP / max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
            with torch.no_grad():
                for parameter, gradient in zip(trained, gradients, strict=True):
                    if gradient is not None:
                        parameter -= rate * gradient
            losses.append(float(loss.detach()))
        self.rate = rate
        return _weights(model), losses[0]

    def check_plan(self, count: int) -> None:
        """Compare the plan's numbers with those of the model."""
        model, plan = self.load(), self.plan
        last = f"{read_structure(model).blocks_path}.{plan.block_count - 1}."
        apply_plan(model, plan)
        trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
        if plan.total_parameters != count or sum(trains.values()) + sum(frozen.values()) != count:
            raise Wrong(f"the plan counts {plan.total_parameters} parameters, the model has {count}")
        if plan.trainable_parameters != sum(trains.values()):
            raise Wrong(f"the plan trains {plan.trainable_parameters} parameters, the model {sum(trains.values())}")
        left_out = [n for n in frozen if n.startswith(last) and n not in plan.fixed]
        if left_out:
            raise Wrong(f"blocks[-1] leaves out {left_out[0]}")
        config = model.config.get_text_config()
        layers = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", plan.block_count)
        if layers % plan.block_count:  # a model may pass its blocks several times
            raise Wrong(f"{plan.block_count} blocks were found, its config says {layers}")

    def check_scores(self) -> None:
        """Compare the score of the windows and the greedy continuation of one with whole passes of the model."""
        model = self.load()
        check_conformance(model, self.block_size)
        windows = Dataset.from_dict({"input_ids": self.ids.tolist()})
        score = score_text(model, ScoredText(windows, self.ids.numel(), self.ids.numel()), 2, None)
        with torch.no_grad():
            wanted = float(cross_entropy(model, self.ids))
        if not abs(score["loss"] - wanted) <= 1e-5:
            raise Wrong(f"its score is {score['loss']:.6f} nats a token, the cross entropy {wanted:.6f}")
        ids = self.ids[:1, :8]
        tokenizer = letters(model.get_input_embeddings().weight.shape[0])
        (probe,) = probe_prompts(model, tokenizer, [tokenizer.decode(ids[0])], top_k=1, new_tokens=4)
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        wanted = tokenizer.decode(ids[0, 8:])
        if not wanted.startswith(probe.continuation) and ids[0, 8:].min() > 2:  # an end ends it, padding has no place
            raise Wrong(f"its greedy continuation is {probe.continuation!r}, that of whole passes {wanted!r}")

    def train(
        self, fast_paths: Sequence[str] = (), accumulation: int = 1, prefix_cache: str = "off"
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Weights after the steps of our Trainer, and the first loss that it logged. What it saves is verified."""
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_from_values(self._recipe(folder, list(fast_paths), accumulation, prefix_cache))
            args = training_arguments(recipe.training)
            model = self.load()
            conformance = check_conformance(model, self.block_size)
            windows = Dataset.from_dict({"input_ids": self.ids.tolist()})
            data = RunData(
                sources=[], train=windows, held_out=None, scored={}, token_counts=np.zeros(1), largest_ids={}
            )
            prefix = prefix_phases(recipe, self.plan, model, args)
            made_of = {"plan": self.plan, "model": model, "args": args, "data": data}
            trainer = make_trainer(recipe, **made_of, prefix=prefix, conformance=conformance).trainer
            trainer.train()
            if trainer.tuning.audit.changed:
                raise Wrong(f"the audit found changes in {', '.join(trainer.tuning.audit.changed)}")
            self._check_saved(trainer, f"{folder}/saved")
            first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
            return _weights(model), first

    def _recipe(self, folder: str, fast_paths: list[str], accumulation: int, prefix_cache: str) -> Mapping[str, Any]:
        return {
            "model_name_or_path": self.base,
            "text": "nothing",
            "block_size": self.block_size,
            "trainable": self.trainable,
            "fast_paths": fast_paths,
            "allow_failed_audit": True,  # a gradient of rounding noise may move nothing here
            "prefix_cache": prefix_cache,
            "output_dir": folder,
            "max_steps": STEPS,
            "per_device_train_batch_size": WINDOWS // accumulation,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
            "learning_rate": self.rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def _check_saved(self, trainer: Trainer, saved: str) -> None:
        """Read the saved folder back: the claim holds, and it is the model that was trained."""
        trainer.save_model(saved)
        audit = trainer.tuning.audit_callback
        different = trainer.tuning.read_back(Path(saved), audit.digests_after, audit.buffers_after)
        if different:
            raise Wrong(f"the run would not know its own files: {different[0]}")
        verify(self.base, saved, self.trainable).raise_if_violated()
        present = _weights(trainer.model)
        try:
            again = _weights(load_model(saved, load_config(saved, dropout=0.0)))
        except InputError as error:
            raise Wrong(f"the saved model cannot be loaded again: {error}") from error
        if {n for n in present if not torch.equal(present[n], again[n])}:
            raise Wrong("the saved model is not the one that was trained")

    def compare(self, way: str, found: tuple[dict[str, torch.Tensor], float]) -> None:
        """Compare weights and first loss with those of the plain loop."""
        weights, loss = found
        trains = set(self.plan.trainable)
        for name, wanted in self.wanted.items():
            if name not in trains and not torch.equal(weights[name], self.before[name]):
                raise Wrong(f"{way}: {name} is frozen and changed")
            apart = float((weights[name] - wanted).abs().max()) if wanted.numel() else 0.0
            if not apart <= CLOSE:
                moved = float((wanted - self.before[name]).abs().max())
                raise Wrong(
                    f"{way}: {name} is {apart:.1e} from where plain PyTorch takes it, which moves it by {moved:.1e}"
                )
        if not abs(loss - self.first_loss) <= 1e-5:
            raise Wrong(
                f"{way}: the first loss is {loss:.6f}, the cross entropy of the next token {self.first_loss:.6f}"
            )


def cross_entropy(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token, nats a token; ids (B, T)."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def letters(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `count` characters."""
    tokenizer = Tokenizer(WordLevel({chr(0x4E00 + number): number for number in range(count)}, unk_token="\u4e00"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split("", "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
