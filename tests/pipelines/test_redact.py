from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.base.redact import redact

SCHEMES = ("postgresql", "postgresql+psycopg2", "mysql", "http", "https", "s3", "ssh")
# A mark that cannot arise by chance in the rest of a text, with whatever stands beside it in a password.
SECRETS = st.builds(
    lambda before, after: f"{before}Zq7x{after}",
    *(st.text(st.characters(codec="utf-8", exclude_characters="\n\r", exclude_categories=["Zs", "Cc"])),) * 2,
)
NAMES = ("password", "sslpassword", "pwd", "token", "access_token", "client_secret", "AwsKeyId", "X-Amz-Signature")


@given(st.sampled_from(SCHEMES), SECRETS, st.sampled_from(["{} failed", "'{}'", "({}): no", "{}", "x\n{}\ny"]))
def test_no_password_is_left(scheme: str, secret: str, around: str) -> None:
    for password in (quote(secret, safe=""), secret.replace("@", "").replace("#", "").replace("?", "")):
        shown = redact(around.format(f"{scheme}://ann:{password}@db.local:5432/runs"))
        assert "Zq7x" not in shown
        assert "ann" not in shown
        assert "db.local:5432/runs" in shown


@given(st.sampled_from(SCHEMES), SECRETS, st.sampled_from(NAMES), st.sampled_from(["?", "?a=1&"]))
def test_no_secret_of_the_query_is_left(scheme: str, secret: str, name: str, before: str) -> None:
    shown = redact(f"see {scheme}://host/path{before}{name}={quote(secret, safe='')}&b=2, then go on")
    assert "Zq7x" not in shown
    assert shown.endswith("=***&b=2, then go on")


@given(st.text())
def test_a_text_without_uri_stays(text: str) -> None:
    text = text.replace("://", "")
    assert redact(text) == text


@given(st.text())
def test_to_redact_again_changes_nothing(text: str) -> None:
    once = redact(f"http://{text}")
    assert redact(once) == once


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("sqlite:////home/ann/mlflow.db", "sqlite:////home/ann/mlflow.db"),
        ("http://127.0.0.1:5000/#/experiments/1", "http://127.0.0.1:5000/#/experiments/1"),
        ("https://token@host/x", "https://***@host/x"),
        ("postgresql://u:p@ss@host/db", "postgresql://***@host/db"),
        ("postgresql://u:p/w@host/db", "postgresql://***@host/db"),
        ("two: a://u:x@h and b://u:y@k", "two: a://***@h and b://***@k"),
        ("(https://h/x?sig=abc).", "(https://h/x?sig=***)."),
    ],
)
def test_examples(given_: str, expected: str) -> None:
    assert redact(given_) == expected
