"""What looks like a secret: by the name it goes under, or by its own shape.

Names of machine learning collide with names of secrets (``key_dim``,
``max_tokens``, ``eos_token``), so a name is read word by word and says one of
three things: a secret whatever the value (`Likeness.CERTAIN`), a secret if the
value is text (`Likeness.PROBABLE`), or nothing (`Likeness.NONE`). In doubt a
name is a secret: a hidden batch key costs a look at the code, a leaked one the
account.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Final

REDACTED: Final = "[redacted]"
#: Longest text that is scanned; what is behind it is cut off, since nobody has looked at it.
SCAN_LIMIT: Final = 65_536


class Likeness(IntEnum):
    """How much a name looks like the name of a secret."""

    NONE = 0
    PROBABLE = 1
    CERTAIN = 2


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# One of these words in a name is enough.
_SECRET_WORDS: Final = _words(
    "password passwords passwd passphrase passcode passkey secret secrets credential credentials cred "
    "creds apikey apikeys apitoken accesskey accesstoken secretkey privatekey authkey authtoken "
    "authorization auth bearer cookie cookies jwt otp sas webhook userinfo"
)
# "key" and "token" behind one of these are secrets, in the plural too.
_AUTH_WORDS: Final = _words(
    "api access auth account admin app application bearer bot client cloud customer deploy encryption "
    "service signing signature shared session ssh ssl tls hmac aes rsa pgp gpg gcp aws azure s3 hf hub "
    "huggingface github gitlab git slack openai anthropic wandb neptune comet mlflow databricks ngc "
    "nvidia docker registry pypi npm storage subscription master root user refresh oauth oauth2 "
    "identity id personal private secret login license telegram discord twilio stripe sentry grafana "
    "vault consul x csrf xsrf security"
)
# "key" and "token" behind one of these are vocabulary of data and models.
_DATA_WORDS: Final = _words(
    "pad eos bos unk cls sep mask special stop start begin end image img audio video speech text next "
    "first last prompt response decoder encoder forced generated padding vocab vocabulary added extra "
    "new word sub byte char register latent memory query value val attention attn head num n max min "
    "total mean avg per seen train training sort primary foreign metric metrics monitor label labels "
    "input inputs output outputs target targets feature features column group groups join partition "
    "cache batch data dataset loss score best dict json index lookup state hot row field sample reward "
    "class task caption category sequence param params config mapping order unique lang language tok "
    "newline eot bot sot system assistant fim im tool rank"
)
# A number under a name with one of these is a measure, not a secret.
_MEASURE_WORDS: Final = _words(
    "num n count counts max min total mean avg size sizes dim dims len length lengths rate ratio scale "
    "per rank heads layers index idx position weight dropout prob width depth budget limit seen seconds "
    "interval"
)
_PASS_OWNERS: Final = _words(
    "db database smtp imap mail user ftp sftp sql mysql pg postgres redis mongo admin root proxy ldap"
)
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LUMP: Final = re.compile(
    r"(?:api|access|secret|private|auth|signing|encryption|session|client)(?:key|token|secret)s?$"
)


@lru_cache(maxsize=4096)
def likeness(name: str) -> Likeness:
    """How much ``name`` (snake_case, camelCase, dashed, dotted) looks like the name of a secret."""
    words = [word.lower() for word in _WORD.findall(name[-200:])]
    if not words:
        return Likeness.NONE
    last, rest = words[-1], words[:-1]
    before = set(rest)
    if any(word in _SECRET_WORDS or _LUMP.search(word) for word in words):
        return Likeness.PROBABLE if set(words) & _MEASURE_WORDS else Likeness.CERTAIN
    if last in {"pwd", "pass"} and before & (_PASS_OWNERS | _AUTH_WORDS):
        return Likeness.CERTAIN
    if last == "pwd" and before:
        return Likeness.CERTAIN
    if last in {"key", "token", "keys", "tokens"}:
        if rest and rest[-1] in _AUTH_WORDS and not before & _MEASURE_WORDS:
            return Likeness.CERTAIN
        if before & _DATA_WORDS or last.endswith("s"):
            return Likeness.NONE
        return Likeness.PROBABLE
    # AWS_ACCESS_KEY_ID, signing-key-v2, api_key_prod: the secret noun stands before a qualifier.
    pairs = itertools.pairwise(words)
    qualified = any(a in _AUTH_WORDS and b in {"key", "token"} for a, b in pairs)
    if qualified and not set(words) & (_MEASURE_WORDS | {"type", "name", "path", "file", "url", "env"}):
        return Likeness.PROBABLE
    return Likeness.NONE


def looks_random(text: str) -> bool:
    """Whether ``text`` is one long word of letters and digits mixed, as keys are and words are not."""
    return (
        len(text) >= 16
        and re.fullmatch(r"[\w+/=.~-]+", text) is not None
        and any(c.isdigit() for c in text)
        and any(c.isalpha() for c in text)
    )


# Unmistakable by shape, wherever they stand. A git commit (40 hex digits) is not among them.
_SHAPES: Final = re.compile(
    r"""
      -----BEGIN\ [A-Z0-9 ]*PRIVATE\ KEY(?:\ BLOCK)?-----.*?
        (?:-----END\ [A-Z0-9 ]*PRIVATE\ KEY(?:\ BLOCK)?-----|\Z)
    | \b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b                    # AWS access key id
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,}        # GitHub
    | \bgl(?:pat|dt|rt|cbt|ptt|ft)-[\w-]{16,}                    # GitLab
    | \bhf_[A-Za-z0-9]{20,} | \bapi_org_[A-Za-z0-9]{20,}         # Hugging Face
    | \bsk-[A-Za-z0-9_-]{20,} | \b[sr]k_(?:live|test)_[A-Za-z0-9]{10,} | \bwhsec_[A-Za-z0-9+/=]{20,}
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,} | \bxapp-[A-Za-z0-9-]{20,}  # Slack
    | \bAIza[\w-]{35} | \bya29\.[\w-]{20,} | \bGOCSPX-[\w-]{20,} # Google
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*                          # JSON web token
    | \bnpm_[A-Za-z0-9]{36} | \bpypi-[\w-]{40,} | \bdckr_pat_[\w-]{20,}
    | \bdapi[0-9a-f]{32}\b | \bnvapi-[\w-]{20,} | \br8_[A-Za-z0-9]{30,}
    | \bSG\.[\w-]{16,}\.[\w-]{16,} | \bglsa_\w{32,} | \bhvs\.[\w-]{20,}
    | \bwandb_v\d+_\w{20,}
    """,
    re.VERBOSE | re.DOTALL,
)
_SLACK_HOOK: Final = re.compile(r"(hooks\.slack\.com/(?:services|workflows|triggers)/)[^\s\"'<>]+")
# The authority up to its last "@"; a password with an unescaped slash, if it cannot be a port and a path.
_USERINFO: Final = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)"
    r"(?:[^\s/?#\"'<>]{1,1024}@|[^\s/@:\"'<>]{0,256}:(?!\d{1,5}(?:[/?#]|\s|$))[^\s@\"'<>]{1,1024}@)"
)
_HEADER: Final = re.compile(
    r"(?P<head>(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)(?:(?P<scheme>[A-Za-z]+)\s+)?[^\s\"',;]+", re.I
)
_BEARER: Final = re.compile(r"(?P<head>\bbearer\s+)[\w.~+/=-]{8,}", re.I)
_ASSIGNMENT: Final = re.compile(
    r"(?P<name>[A-Za-z][\w.-]{0,99})(?P<equals>[\"']?\s{0,3}(?:=|:(?!//))\s{0,3})"
    r"(?P<value>\"[^\"]{1,4096}\"|'[^']{1,4096}'|[^\s\"',;&}\])]+)"
)
_OPTION: Final = re.compile(r"(?P<option>(?<!\S)--?(?P<name>[A-Za-z][\w.-]{0,99})\s+)(?P<value>(?!-)[^\s\"']+)")
_QUERY_SECRETS: Final = _words("sig signature x-amz-signature x-amz-credential x-amz-security-token x-goog-signature")


def _assignment(match: re.Match[str]) -> str:
    name, equals, value = match["name"], match["equals"], match["value"]
    quote = value[0] if value[0] in "\"'" else ""
    bare = value.strip("\"'")
    like = likeness(name)
    if bare.startswith(REDACTED[:-1]) or _plain_number(bare):
        hide = like is Likeness.CERTAIN and not bare.startswith(REDACTED[:-1])
    elif name.lower() in _QUERY_SECRETS:
        hide = True
    elif like is Likeness.PROBABLE:  # prose has "key: value" too; an equals sign or a quote is code
        hide = not is_special_token(bare) and ("=" in equals or bool(quote) or looks_random(bare))
    else:
        hide = like is Likeness.CERTAIN
    return f"{name}{equals}{quote}{REDACTED}{quote}" if hide else match[0]


def _option(match: re.Match[str]) -> str:
    hide = likeness(match["name"]) and not _plain_number(match["value"]) and not is_special_token(match["value"])
    return f"{match['option']}{REDACTED}" if hide else match[0]


def _plain_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d*\.?\d+(?:[eE][+-]?\d+)?|true|false|none|null", text, re.I) is not None


def is_special_token(text: str) -> bool:
    """Whether ``text`` is a tokenizer's special token, like ``</s>`` or ``[PAD]``."""
    return re.fullmatch(r"<[^<>]{1,40}>|\[[A-Z_]{1,20}\d*\]|\s*", text) is not None


_RULES: Final[tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]] = (
    (_SHAPES, REDACTED),
    (_USERINFO, r"\g<scheme>"),
    (_SLACK_HOOK, rf"\g<1>{REDACTED}"),
    (_HEADER, rf"\g<head>{REDACTED}"),
    (_BEARER, rf"\g<head>{REDACTED}"),
    (_ASSIGNMENT, _assignment),
    (_OPTION, _option),
)


def scrub(text: str) -> str:
    """``text`` without the secrets in it: known shapes, userinfo of URLs, values assigned to secret names.

    Linear in the length; at most `SCAN_LIMIT` characters come back.
    """
    text = text[:SCAN_LIMIT]
    if not any(c in text for c in "=:_-. "):  # one plain word
        return _SHAPES.sub(REDACTED, text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
