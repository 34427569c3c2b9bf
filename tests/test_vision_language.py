"""Models that read images: trained with images through `attach`, and their language part on text by `train`."""

import json
import random
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Trainer,
    TrainingArguments,
)

import partialtune as pt
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.engine.prefix import PrefixCache
from partialtune.engine.state_store import MemoryStore
from partialtune.model.loading import auto_class
from partialtune.model.parameters import named_weights
from tiny_models import tiny_config

LENGTH, WINDOWS, BATCH, EPOCHS = 12, 8, 4, 3
WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
IMAGE = 90  # the id of the token that an image's patches take the place of
PATCHES = 4
CLOSE = 1e-6
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


def llava_config():
    sight = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**sight, image_size=16, patch_size=8, projection_dim=16).to_dict(),
        text_config=LlamaConfig(**TEXT).to_dict(),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )


def qwen_config():
    sight = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLConfig(
        vision_config={
            **sight,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )


CONFIGS = {"llava": llava_config, "qwen2_5_vl": qwen_config}


def model_of(kind):
    torch.manual_seed(3)
    return AutoModelForImageTextToText.from_config(CONFIGS[kind]()).eval()


class Captions(Dataset):
    """Rows of text around an image: equal texts come with different images."""

    def __init__(self, kind, seed=0, texts=2):
        draw = random.Random(seed)
        self.kind = kind
        self.texts = [[draw.randrange(3, 80) for _ in range(LENGTH - PATCHES)] for _ in range(texts)]
        self.images = torch.randn((WINDOWS, 3, 16, 16), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return WINDOWS

    def __getitem__(self, number):
        text = self.texts[number % len(self.texts)]
        ids = [text[0], *[IMAGE] * PATCHES, *text[1:]]
        row = {"input_ids": ids, "labels": [-100 if one == IMAGE else one for one in ids]}
        if self.kind == "llava":
            return {**row, "pixel_values": self.images[number]}
        # Qwen's processor gives patches, merged 2 x 2 to a token: (16 patches of 3 x 2 x 4 x 4, 4 tokens)
        flat = self.images[number].repeat(2, 1, 1, 1).reshape(16, 3 * 2 * 4 * 4)
        return {**row, "pixel_values": flat, "image_grid_thw": torch.tensor([1, 4, 4])}


def collate(rows):
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "image_grid_thw" in rows[0]:
        batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
        batch["image_grid_thw"] = torch.stack([row["image_grid_thw"] for row in rows])
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    else:
        batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
    return batch


def run(folder, kind, trainable, attached, seed=0, settings=None, resume=None, **options):
    """Train with images in a plain Trainer -> its Trainer and, where attached, its tuning."""
    model = model_of(kind)
    plan = pt.plan_freeze(model, trainable)
    if not attached:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in plan.trainable)
    used = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-4}
    used |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    args = TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **{**used, **(settings or {})})
    trainer = Trainer(model=model, args=args, train_dataset=Captions(kind, seed), data_collator=collate)
    tuning = pt.attach(trainer, plan, **options) if attached else None
    trainer.train(resume_from_checkpoint=resume)
    return trainer, tuning


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "trainable", [["projector", "language.blocks[-1]"], ["vision", "projector"], ["language.blocks[-1]", "final_norm"]]
)
def test_with_images_a_plain_trainer_ends_with_the_weights_of_one_frozen_by_hand(tmp_path, kind, trainable):
    plain, _ = run(tmp_path / "plain", kind, trainable, False)
    attached, tuning = run(tmp_path / "attached", kind, trainable, True)
    before = dict(model_of(kind).named_parameters())
    expected = dict(plain.model.named_parameters())
    for name, values in named_weights(attached.model):
        if name.endswith("k_proj.bias"):  # its gradient is rounding noise, of which AdamW makes steps: softmax of
            continue  # attention does not change where all keys move alike
        assert torch.allclose(values, expected[name], rtol=0, atol=CLOSE), name
    for name in tuning.plan.frozen:
        assert torch.equal(dict(named_weights(attached.model))[name], before[name]), name
    moved = [name for name in tuning.plan.trainable if not torch.equal(expected[name], before[name])]
    assert set(tuning.plan.trainable) == set(moved) | set(tuning.audit.unmoved)
    assert tuning.audit.passed
    assert json.loads((tmp_path / "attached" / "audit.json").read_text())["passed"] is True
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (plain, attached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "loss" in tuning.fast.in_use


@pytest.mark.parametrize("kind", CONFIGS)
def test_states_of_a_row_are_not_given_to_the_same_text_with_another_image(kind):
    model, data = model_of(kind), Captions(kind, texts=1)
    first, second = collate([data[0], data[1]]), collate([data[2], data[3]])
    swapped = collate([data[1], data[0]])
    assert torch.equal(first["input_ids"], second["input_ids"])
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in (first, second, first, swapped)]
        assert not torch.allclose(wanted[0], wanted[1], atol=1e-3)  # they see what differs
        cache = PrefixCache(model, 2, MemoryStore(2**30, torch.uint8))
        cache.put_on()
        try:
            found = [model(**batch, use_cache=False).logits for batch in (first, second, first, swapped)]
        finally:
            cache.take_off()
    assert (cache.hits, cache.misses) == (2, 6)  # the first batch alone came again
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)


def test_two_images_of_one_row_are_no_image_of_each():
    """(two images, none) and (none, two images) are batches with the same pixel_values, of two images for two rows."""
    config = llava_config()
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config).eval()
    ids = torch.randint(3, 80, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 4:] = torch.tensor([IMAGE] * 8)
    one, other = ids.clone(), ids.clone()
    one[1, 4:], other[0, 4:] = 5, 5
    pixels = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": row, "pixel_values": pixels, "use_cache": False} for row in (one, other, one)]
    batches.insert(1, {**batches[0], "pixel_values": pixels.flip(0)})
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in batches]
        cache = PrefixCache(model, 1, MemoryStore(2**30, torch.uint8))
        cache.put_on()
        found = [model(**batch).logits for batch in batches]
        cache.take_off()
    assert cache.hits == 2
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)


# ---- the language part on text, by a recipe --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "is_causal", "is_whole"),
    [
        ("llava", False, True),
        ("qwen2_5_vl", False, True),
        ("mllama", False, True),
        ("gemma3", True, True),
        ("llama", True, True),
        ("qwen3_5", True, False),  # its text part is a model of its own, and what AutoModelForCausalLM gives
    ],
)
def test_the_auto_class_is_one_that_loads_again_what_it_loaded(kind, is_causal, is_whole):
    config = tiny_config(kind)
    assert auto_class(config) is (AutoModelForCausalLM if is_causal else AutoModelForImageTextToText)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    assert (type(model.config) is type(config)) == is_whole
    assert auto_class(model.config) is auto_class(config)
    assert type(model.config) in auto_class(config)._model_mapping


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny LLaVA with the bundled tokenizer, and a file that says how its images are read."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    config = llava_config()
    config.text_config.vocab_size, config.image_token_id = len(tokenizer) + 1, len(tokenizer)
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return folder


@pytest.fixture
def recipe(tmp_path, base):
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60, encoding="utf-8")
    values = {
        "model_name_or_path": str(base),
        "text": str(tmp_path / "text.txt"),
        "block_size": 16,
        "trainable": ["language.blocks[-1]", "final_norm"],
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "prompts": ["It was"],
        "save_steps": 2,
        "eval_strategy": "no",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "recipe.yaml")


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_train_teaches_the_language_part_on_text_and_leaves_the_rest_as_it_was(tmp_path, base, recipe):
    run = tmp_path / "run"
    assert main(["train", recipe]) == 0
    before, after = tensors(base), tensors(run)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("language_model.model.layers.2.", "language_model.model.norm.")) for name in moved)
    loaded = AutoModelForImageTextToText.from_pretrained(run)
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
    assert (run / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    assert "AutoModelForImageTextToText.from_pretrained" in (run / "README.md").read_text(encoding="utf-8")
    claim = ["--trainable", "language.blocks[-1]", "final_norm"]
    assert main(["verify", str(base), str(run), *claim]) == 0
    assert main(["verify", str(base), str(run), "--trainable", "final_norm"]) == 3

    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=lambda _, names: [name for name in names if name == "checkpoint-4"])
    for name in ("model.safetensors", "evaluation.json", "exit.json"):
        (again / name).unlink()
    words = ["--output_dir", str(again), "--resume_from_checkpoint", "auto"]
    assert main(["train", str(run / "recipe.yaml"), *words]) == 0
    resumed = tensors(again)
    assert all(torch.equal(resumed[name], after[name]) for name in after)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_delta_of_the_language_part_becomes_the_whole_model_again(tmp_path, base, recipe):
    assert main(["train", recipe]) == 0
    as_delta = ["--checkpoint_format", "delta", "--output_dir", str(tmp_path / "delta")]
    assert main(["train", recipe, *as_delta]) == 0
    assert main(["apply", str(tmp_path / "delta"), str(tmp_path / "whole")]) == 0
    expected, whole = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file()
    assert main(["verify", str(base), str(tmp_path / "delta"), "--trainable", "language.blocks[-1]", "final_norm"]) == 0


@pytest.mark.parametrize("trainable", [["vision"], ["projector", "language.blocks[-1]"], [r"/.*vision_tower.*/"]])
def test_what_no_text_reaches_is_refused_by_train(recipe, capsys, trainable):
    assert main(["train", recipe, "--trainable", *trainable]) == 2
    said = capsys.readouterr()
    assert "no gradient reaches" in said.out + said.err
    assert "attach(trainer, plan)" in said.out + said.err


def test_a_model_that_reads_images_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole, _ = run(tmp_path / "whole", "llava", ["projector", "language.blocks[-1]"], True, settings=options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed, tuning = run(
        tmp_path / "again", "llava", ["projector", "language.blocks[-1]"], True, settings=options, resume=checkpoint
    )
    expected = dict(named_weights(whole.model))
    assert all(torch.equal(values, expected[name]) for name, values in named_weights(resumed.model))
    assert tuning.audit.passed
