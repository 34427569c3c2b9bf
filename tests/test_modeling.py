"""Models load whole and in fp32, or are refused in one sentence that says why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, OPTConfig

from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.errors import ModelError
from partialtune.model.digests import digests
from partialtune.model.loading import empty_model, load_config, load_model, load_tokenizer, quiet_libraries
from partialtune.model.model_checks import check_fit, check_ids
from partialtune.model.train_mode import is_dropout, set_dropout


@pytest.fixture
def folder(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return load_model(str(folder), load_config(str(folder)))


def test_a_folder_loads_in_fp32_and_eval_mode_with_its_own_weights(folder):
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_gpt2().parameters(), strict=True))


def test_a_16_bit_base_is_widened_exactly(tmp_path):
    narrow = tiny_gpt2().to(torch.bfloat16)
    narrow.save_pretrained(tmp_path)
    for wide, original in zip(load(tmp_path).parameters(), narrow.parameters(), strict=True):
        assert wide.dtype == torch.float32
        assert torch.equal(wide, original.float())


def test_a_16_bit_base_is_held_in_its_own_bits(tmp_path):
    """Each parameter as it is in the file, mapped; what the model computes for itself as in fp32."""
    from test_saving import MODELS

    kinds = {"norm": torch.float32, "down_proj": torch.float16}
    for name in ("Gemma 3", "Mixtral", "GPT-2"):
        model, folder = MODELS[name](), tmp_path / name
        for key, parameter in model.named_parameters():
            parameter.data = parameter.data.to(next((kinds[kind] for kind in kinds if kind in key), torch.bfloat16))
        model.save_pretrained(folder)
        file = folder / "model.safetensors"
        before = file.read_bytes()
        config = load_config(str(folder))
        held, wide = load_model(str(folder), config, narrow=True), load_model(str(folder), config)
        in_file = {n: p.dtype for n, p in model.named_parameters() if p.ndim > 1}
        assert {n: p.dtype for n, p in held.named_parameters() if p.ndim > 1} == in_file
        assert digests(held) == digests(wide) == digests(model)
        for (key, mine), (_, theirs) in zip(held.named_buffers(), wide.named_buffers(), strict=True):
            assert mine.dtype == theirs.dtype, key
            assert torch.equal(mine, theirs), key
        assert (held.config.to_dict(), held.training) == (wide.config.to_dict(), False)
        with torch.no_grad():
            for parameter in held.parameters():
                parameter.add_(1)
        assert file.read_bytes() == before


def test_a_base_with_the_names_and_mask_buffers_of_the_hubs_file_loads_the_same(folder):
    original = {name: p.clone() for name, p in load(folder).named_parameters()}
    rename_to_hub(folder)
    assert all(torch.equal(p, original[name]) for name, p in load(folder).named_parameters())


def rename_to_hub(folder):
    """Give a GPT-2 weight file the names and the mask buffers that the Hub's own has."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for block in range(3):
        renamed[f"h.{block}.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64))
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def test_dropout_is_put_on_every_dropout_of_the_config(folder):
    config = load_config(str(folder), dropout=0)
    assert {key: value for key, value in config.to_dict().items() if key.endswith("pdrop")} == dict.fromkeys(
        ("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0
    )
    assert load_config(str(folder)).resid_pdrop == 0.1


def test_dropout_reaches_other_architectures_by_the_names_of_their_fields():
    from transformers import LlamaConfig

    opt, llama = OPTConfig(), LlamaConfig()
    set_dropout(opt, 0.25)
    set_dropout(llama, 0.25)
    assert (opt.dropout, opt.attention_dropout, opt.layerdrop) == (0.25, 0.25, 0.0)
    assert llama.attention_dropout == 0.25


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        *(
            (key, True)
            for key in (
                "dropout",
                "attn_pdrop",
                "hidden_dropout_prob",
                "drop_rate",
                "attn_drop_rate",
                "token_emb_dropout",
            )
        ),
        *((key, False) for key in ("layerdrop", "decoder_layerdrop", "layer_drop", "drop_path_rate", "path_dropout")),
        *((key, False) for key in ("drop_connect_rate", "token_dropout", "moe_token_dropout", "fusion_droppath")),
        *((key, False) for key in ("normalize_router_prob_before_dropping", "drop_vision_last_layer")),
    ],
)
def test_a_dropout_is_known_by_its_name_and_what_drops_layers_paths_or_tokens_is_none(key, expected):
    assert is_dropout(key) is expected


def test_dropout_reaches_a_config_within_the_config_and_is_refused_where_its_type_forbids_it():
    from transformers import DbrxConfig, MptConfig

    dbrx, mpt = DbrxConfig(), MptConfig()
    set_dropout(dbrx, 0.25)
    assert (dbrx.resid_pdrop, dbrx.attn_config.attn_pdrop) == (0.25, 0.25)
    set_dropout(mpt, 0)
    with pytest.raises(ModelError, match=r"dropout is 0\.25, and attn_pdrop of MptAttentionConfig takes no such value"):
        set_dropout(mpt, 0.25)


def test_layer_drop_is_said_aloud_where_the_config_has_it_in_a_plan_too(tmp_path, caplog):
    (tmp_path / "model").mkdir()
    says = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48, "layerdrop": 0.25}
    OPTConfig(**says, vocab_size=64, word_embed_proj_dim=32, max_position_embeddings=64).save_pretrained(
        tmp_path / "model"
    )
    recipe = {"model_name_or_path": str(tmp_path / "model"), "text": "x.txt", "trainable": ["blocks[-1]"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "block_size": 16, "output_dir": "run"}))
    for dropout in ("model", "0.5"):
        assert main(["plan", str(tmp_path / "recipe.yaml"), "--dropout", dropout]) == 0
        assert caplog.text.count("LayerDrop is off (it was model.decoder.layerdrop 0.25)") == 1
        caplog.clear()


def test_the_empty_model_has_shapes_and_ties_but_no_weights(folder):
    model = empty_model(load_config(str(folder)))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.lm_head.weight is model.transformer.wte.weight


def refused(name, match):
    with pytest.raises(ModelError, match=match) as caught:
        load_model(str(name), load_config(str(name)))
    assert "\n" not in str(caught.value)


def test_names_that_are_neither_folder_nor_hub_id_are_refused(tmp_path):
    refused(tmp_path / "absent", "there is no folder")
    refused("./absent", "there is no folder")
    refused("two words", "no Hub id")
    refused("builtin:absent", "lilliput")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path, r"without config\.json")


def test_a_damaged_weight_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight")
    refused(folder, "damaged")


def test_a_shortened_weight_file_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, "damaged")


def test_a_model_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot be loaded")


def test_a_pickle_is_not_opened(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "safetensors")


def test_a_weight_file_that_lacks_tensors_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"lacks 1 of the model's tensors, transformer\.h\.1\.mlp\.c_fc\.weight")


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    refused(tmp_path, "causal language models")


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "cannot be loaded")


CONFIGS = [
    *({"n_head": value} for value in (0, "x", 10**30)),
    *({"n_embd": value} for value in ("x", 0, -1, 1e400)),
    *({"n_layer": value} for value in ("2", [])),
    *({"vocab_size": value} for value in (None, -5)),
    *({"activation_function": value} for value in (5, "nope")),
    *({"model_type": value} for value in (5, None, ["gpt2"])),
    *({"dtype": value} for value in ("float99", 7)),
    *({"quantization_config": 3}, {"auto_map": 5}, {"rope_scaling": 4}, {"id2label": [1]}, {"_attn_implementation": 5}),
    *([], 5, None, "x"),
]


@pytest.mark.parametrize("config", [*map(json.dumps, CONFIGS), "[" * 100_000, '{"a":' * 100_000, "{", ""])
def test_a_config_of_any_values_is_taken_or_refused_in_words(folder, config):
    file = folder / "config.json"
    values = json.loads(config) if config.startswith('{"') and config.endswith("}") else None
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}) if values else config)

    def load_all():
        loaded = load_config(str(folder))
        empty_model(loaded)
        load_model(str(folder), loaded)

    with pytest.raises(ModelError, match=r"cannot be loaded|is a None model|lacks"):
        load_all()


def test_a_folder_without_tokenizer_is_refused(folder):
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(folder))


def test_windows_longer_than_the_context_and_ids_beyond_the_model_are_refused(caplog):
    config = GPT2Config(n_positions=64, vocab_size=128)
    check_fit("m", config, block_size=64, vocabulary=128)
    with pytest.raises(ModelError, match="context of 64"):
        check_fit("m", config, block_size=65, vocabulary=128)
    assert "tokenizer" not in caplog.text
    check_fit("m", config, block_size=64, vocabulary=129)
    assert "its tokenizer has 129 tokens, its model 128" in caplog.text
    check_ids("m", config, {"text": 127})
    with pytest.raises(ModelError, match=r"eval_texts b has a token with the id 128, .* 0 to 127"):
        check_ids("m", config, {"text": 127, "eval_texts b": 128})


def advised_code(name):
    """The code of the `python -c` command with which a refusal ends."""
    with pytest.raises(ModelError) as caught:
        load_model(str(name), load_config(str(name)))
    return str(caught.value).split('python -c "')[1].removesuffix('"')


def save_tokenizer(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(builtin_folder("builtin:lilliput") / file, folder / file)


def test_the_conversion_that_is_advised_for_pickles_gives_a_folder_that_loads_the_same(folder, tmp_path, monkeypatch):
    original = load(folder).state_dict()
    save_tokenizer(folder)
    torch.save(original, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    exec(advised_code(folder), {})
    converted = load(tmp_path / "CONVERTED").state_dict()
    assert all(torch.equal(converted[name], values) for name, values in original.items())
    load_tokenizer(str(tmp_path / "CONVERTED"))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside its base"])
def test_the_merge_that_is_advised_for_adapters_gives_a_folder_that_loads(folder, tmp_path, monkeypatch, beside):
    peft = pytest.importorskip("peft")
    save_tokenizer(folder)
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load(folder), config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapter = folder if beside else tmp_path / "alone"
    with torch.random.fork_rng():
        adapted.save_pretrained(adapter)
    code = advised_code(adapter)
    if beside:
        (tmp_path / "ADAPTER").mkdir()
        for file in folder.glob("adapter_*"):
            file.rename(tmp_path / "ADAPTER" / file.name)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    ids = torch.arange(12)[None]
    merged = load(tmp_path / "MERGED")
    assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, load(folder)(ids).logits, atol=1e-2)


def add_to_file(folder, **tensors):
    whole = load_file(folder / "model.safetensors") | tensors
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_the_model_has_no_place_for_is_a_warning_and_remains_of_old_files_are_not(folder, caplog):
    rename_to_hub(folder)
    add_to_file(folder, **{"h.0.attn.masked_bias": torch.tensor(-1e4)})
    load(folder)
    assert ours(caplog) == []
    add_to_file(folder, **{"score.weight": torch.ones(2, 32)})
    load(folder)
    assert "1 tensors that the causal language model has no place for, score.weight first" in ours(caplog)[0]


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("partialtune")]


def test_what_transformers_says_is_passed_on_once_and_what_means_nothing_here_is_not(caplog):
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    try:
        quiet_libraries()
        library = transformers_logging.get_logger("transformers.models.some")
        for words in (
            "If you want to use `X` as standalone,\nadd `is_decoder=True.`",
            "`loss_type=None` was set in it",
        ):
            library.warning(words)
            library.warning(words)
        library.info("for its own sake")
        assert ours(caplog) == ["transformers says: If you want to use `X` as standalone, add `is_decoder=True.`"]
    finally:
        transformers_logging.set_verbosity(verbosity)


def test_a_file_of_more_blocks_than_the_config_is_refused_under_either_of_its_names(tmp_path):
    tiny_gpt2(n_layer=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    refused(tmp_path, r"holds 22 tensors of blocks .* transformer\.h\.2\.")  # the class itself drops c_attn.bias
    rename_to_hub(tmp_path)
    refused(tmp_path, r"holds 22 tensors of blocks .* h\.2\.")


def test_a_config_that_sets_no_limit_takes_windows_of_any_length():
    from transformers import XLNetConfig

    unlimited = [XLNetConfig(vocab_size=128), *(GPT2Config(n_positions=limit, vocab_size=128) for limit in (-1, 0))]
    for config in unlimited:  # XLNet's says -1
        check_fit("m", config, block_size=4096, vocabulary=128)


def test_the_weights_are_not_read_from_a_copy_that_was_deleted(folder):
    shutil.rmtree(folder)
    refused(folder, "there is no folder")
