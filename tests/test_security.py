"""What a run must never do: tell a secret, run code that came with a file, fetch over anything but http(s)."""

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote

import pytest
import torch
import yaml

from cluster import small_recipe
from conftest import REPOSITORY
from partialtune.cli import main
from partialtune.engine.checkpoint_files import finish_checkpoint, newest_whole_checkpoint
from partialtune.errors import InputError, TextError
from partialtune.net.addresses import lacks_secrets, without_secrets
from partialtune.net.download import Limits
from partialtune.recipe.arguments import ModelArguments
from partialtune.recipe.recipe import read_recipe
from partialtune.text.reading import read_texts
from partialtune.training.resume_check import check_checkpoint, recipe_differences

SECRET = "hf_ThisIsASecretThatNobodyMayEverSeeAnywhere"
SOURCE = REPOSITORY / "src" / "partialtune"


def everything_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_token_in_the_environment_is_in_no_byte_of_what_a_run_or_a_failure_leaves(tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe(tmp_path, max_steps=2, schedule=[], report_to="tensorboard")
    assert main(recipe) == 0
    assert main([*recipe, "--resume_from_checkpoint", "auto", "--max_steps", "4", "--text", "missing.txt"]) == 2
    assert main([*recipe, "--output_dir", str(tmp_path / "other"), "--hub_token", SECRET]) == 2
    with pytest.raises(TextError):
        read_texts([f"http://me:{SECRET}@127.0.0.1:9/book.txt"])
    out = capfd.readouterr()
    assert SECRET not in out.out + out.err
    files = everything_under(tmp_path)
    assert len(files) > 30
    assert [path for path, content in files.items() if SECRET.encode() in content] == []


PASSWORD, TOKEN, SIGNATURE = "pa55-Word-of-me", "t0ken/With+Signs=", "5ignature0123456789abcdef"
LOCKED_TEXT = " ".join(f"It was the age of wisdom {n}, it was the season of light." for n in range(200))


@pytest.fixture
def locked(monkeypatch):
    """Addresses of a server that answers those who say all three secrets, 401 to others, and drops /broken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            said = parse_qs(query)
            right = self.headers.get("Authorization") == f"Basic {base64.b64encode(f'me:{PASSWORD}'.encode()).decode()}"
            right = right and said.get("token") == [TOKEN] and said.get("X-Amz-Signature") == [SIGNATURE]
            if path == "/broken":
                self.close_connection = True
                return
            if path == "/away":
                self.send_response(302)
                self.send_header("Location", f"http://me:{PASSWORD}@[::1?token={TOKEN}")
                self.end_headers()
                return
            right = right and path != "/none"
            body = LOCKED_TEXT.encode() if right else b"who are you?"
            self.send_response(200 if right else 401)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    query = f"raw=1&token={quote(TOKEN, safe='')}&X-Amz-Signature={SIGNATURE}"
    yield lambda path: f"http://me:{PASSWORD}@127.0.0.1:{server.server_port}{path}?{query}#chapter-1"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_secrets_of_a_texts_address_are_in_no_byte_of_what_a_run_leaves(tmp_path, monkeypatch, capfd, locked):
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("partialtune.net.download.Limits", lambda: Limits(tries=2, first_wait_seconds=0.01))
    url, other = locked("/a.txt"), locked("/b.txt")
    recipe = small_recipe(
        tmp_path,
        max_steps=2,
        schedule=[],
        text=url,
        eval_texts={"other": other},
        lr_scheduler_type="constant",
        prompts=[],
    )
    (tmp_path / "recipe.yaml").rename(tmp_path / "secret.yaml")
    recipe[1] = str(tmp_path / "secret.yaml")
    run = tmp_path / "run"
    assert main(recipe) == 0
    assert main(recipe) == 0  # finished: the same run, though its recipe was written without the secrets
    assert main([*recipe, "--resume_from_checkpoint", "auto", "--max_steps", "3"]) == 0
    shutil.copyfile(run / "recipe.yaml", tmp_path / "again.yaml")
    again = ["train", str(tmp_path / "again.yaml"), "--output_dir", str(tmp_path / "other")]
    assert main(again) == 2  # it is a recipe, but cannot be fetched
    said = capfd.readouterr()
    assert "was written down without its password or token" in said.err
    assert "Traceback" not in said.err
    written = said.out + said.err
    assert main([*again, "--text", url, "--eval_texts", json.dumps({"other": other}), "--max_steps", "1"]) == 0
    for path in ("/broken", "/away", "/none"):
        assert main([*recipe, "--output_dir", str(tmp_path / "failed"), "--text", locked(path), url, url]) == 2
    assert main([*recipe, "--text", url, "ftp" + url[4:]]) == 2
    assert main([*recipe, "--texts", url]) == 2
    monkeypatch.chdir(tmp_path)
    assert main(["train", url, "--max_steps", "1", "--prompts", "[]"]) == 0  # the text alone: a recipe is proposed
    assert main(["init", url]) == 0
    assert main(["init", url]) == 2
    (tmp_path / "wrong.yaml").write_text(f"text: [{url}\nblock_size: - 3")
    assert main(["train", str(tmp_path / "wrong.yaml")]) == 2
    for file in ("wrong.yaml", "secret.yaml"):
        (tmp_path / file).unlink()
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    written += said.out + said.err
    files = everything_under(tmp_path)
    assert len(files) > 40
    for secret in (PASSWORD, TOKEN, quote(TOKEN, safe=""), SIGNATURE):
        assert secret not in written
        assert [path for path, content in files.items() if secret.encode() in content] == []
    shown = without_secrets(url)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["sources"][0]["name"] == shown
    assert json.loads((run / "checkpoint-2" / "origin.json").read_text())["text"][0]["name"] == shown
    assert read_recipe(run / "recipe.yaml").text.text == [shown]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://host/a.txt", "http://host/a.txt"),
        ("https://me:SECRET@host:80/a.txt", "https://***@host:80/a.txt"),
        ("https://SECRET@host/a.txt#SECRET", "https://***@host/a.txt"),
        ("http://me:SE@CRET@host/@me", "http://***@host/@me"),
        ("http://me:SEC/RET@host/a.txt", "http://***@host/a.txt"),
        ("http://me:SEC#RET@host/a.txt?x=SECRET", "http://***@host/a.txt"),
        ("http://h/a?id=829&token=SECRET", "http://h/a?id=***&token=***"),
        ("http://h/a?SECRET", "http://h/a?***"),
        ("http://h/a?raw=1&dl=true&x=", "http://h/a?raw=1&dl=true&x="),
        ("http://h/a;jsessionid=SECRET/b?X-Amz-Credential=SECRET", "http://h/a;jsessionid=***/b?X-Amz-Credential=***"),
        ("http://me:SECRET@[::1", "http://***@[::1"),
        ("it's http://me:SECRET@h/a?t=SECRET. Yes", "it's http://***@h/a?t=***. Yes"),
        ("no http:/me:SECRET@h/a here", "no http:/***@h/a here"),
        ("exceeded with url: /a.txt?t=SECRET&u=SECRET (Caused", "exceeded with url: /a.txt?t=***&u=*** (Caused"),
        ("Did you mean a=b? No: c=d.", "Did you mean a=b? No: c=d."),
        ("C:/a/b.txt?", "C:/a/b.txt?"),
    ],
)
def test_what_is_shown_of_an_address(address, shown):
    assert without_secrets(address) == shown
    assert without_secrets(shown) == shown
    assert not address.startswith("http") or lacks_secrets(shown) == ("***" in shown)


def test_an_address_with_and_without_its_secrets_is_one_source_and_two_whole_ones_are_two():
    whole, other, masked = ({"text": [text]} for text in ("http://h/a?id=17", "http://h/a?id=18", "http://h/a?id=***"))
    base = {"model_name_or_path": "x", "trainable": ["all"]}
    assert recipe_differences({**base, **masked}, {**base, **whole}) == []
    assert recipe_differences({**base, **whole}, {**base, **other}) == ["text"]
    named = [{**base, "text": "t", "eval_texts": {"b": text}} for text in ("http://h/a?id=***", "http://h/a?id=18")]
    assert recipe_differences(*named) == []


class Planted:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoints_pickles_is_never_run(tmp_path, name, capfd):
    recipe = small_recipe(tmp_path, max_steps=2, schedule=[], lr_scheduler_type="constant")
    assert main(recipe) == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    aside = tmp_path / "run" / ".unfinished" / "checkpoint-2"
    aside.parent.mkdir()
    checkpoint.rename(aside)
    torch.save({"state": Planted(tmp_path / "planted"), "param_groups": []}, aside / name)
    finish_checkpoint(aside, checkpoint)  # its digests are right: whoever planted it could write there
    assert newest_whole_checkpoint(tmp_path / "run") == checkpoint
    assert main([*recipe, "--resume_from_checkpoint", "auto", "--max_steps", "4"]) == 2
    assert "cannot be gone on from" in capfd.readouterr().err
    assert not (tmp_path / "planted").exists()


def test_remote_code_is_off_unless_asked_for():
    assert ModelArguments(model_name_or_path="x").trust_remote_code is False


def test_yaml_and_pickles_are_read_the_safe_way_everywhere_in_the_package():
    code = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    for path, text in code.items():
        assert not re.search(r"yaml\.(load|unsafe_load|full_load)\(", text), path
        assert not re.search(r"\bpickle\.loads?\(", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (path, call)
        assert not re.search(r"\b(eval|exec)\(", re.sub(r"\.eval\(", "", text)), path


@pytest.mark.parametrize("address", ["ftp://host/a.txt", "file:///etc/passwd", "gopher://host/", "s3://bucket/a.txt"])
def test_texts_are_fetched_over_http_and_https_only(address):
    with pytest.raises(TextError, match="over http and https only"):
        read_texts([address])


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/none"]
)
def test_a_recipe_with_pythons_yaml_tags_is_refused(tmp_path, tag, capfd):
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: builtin:lilliput\ntext: {tag}\n")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_checkpoint_whose_state_is_no_state_is_refused(tmp_path):
    aside = tmp_path / ".unfinished" / "checkpoint-2"
    aside.mkdir(parents=True)
    (aside / "trainer_state.json").write_text(json.dumps({"global_step": "two"}))
    finish_checkpoint(aside, tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match="cannot be gone on from"):
        check_checkpoint(tmp_path / "checkpoint-2", None)
