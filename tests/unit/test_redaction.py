"""Secrets by their shape and by the environment, and words that are none."""

import pytest

from trainer.config.redaction import redact, refuse_secrets

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"hub.repo={TOKEN}", "hub.repo=***"),
        (f"--token={TOKEN} --out x", "--token=*** --out x"),
        ("https://user:secret@host/x.tar", "https://***@host/x.tar"),
        (f"https://{TOKEN}@huggingface.co/a/b", "https://***@huggingface.co/a/b"),
        ("user/birds@v1.0", "user/birds@v1.0"),
        ("timm/deit3_huge_patch14_224.fb_in1k", "timm/deit3_huge_patch14_224.fb_in1k"),
        ("hf-hub:owner/hf_transfer", "hf-hub:owner/hf_transfer"),
        ("https://host/a@b", "https://host/a@b"),
    ],
)
def test_by_shape(monkeypatch, text, expected):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert redact(text) == expected
    if text == expected:
        refuse_secrets([text], "the command line")
    else:
        with pytest.raises(ValueError, match="the command line holds a token or password") as caught:
            refuse_secrets(["good", text], "the command line")
        assert TOKEN not in str(caught.value) and "secret" not in str(caught.value)


def test_by_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "short")  # no token is: blanking it would hit other words
    assert redact("short key=0123456789abcdef") == "short key=***"
