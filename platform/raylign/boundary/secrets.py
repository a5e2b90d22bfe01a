"""What a secret is, by its name or by its looks. Whatever is published, inherited or logged asks here.

The looks of vendors' keys are those of Yelp's detect-secrets, with a few that it lacks and without those that take more
than linear time on hostile text.
"""

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector

REDACTED = "[redacted]"
_DETECTORS: tuple[type[RegexBasedDetector], ...] = (
    *(AWSKeyDetector, AzureStorageKeyDetector, DiscordBotTokenDetector, GitHubTokenDetector, GitLabTokenDetector),
    *(MailchimpDetector, PypiTokenDetector, SendGridDetector, SlackDetector, SquareOAuthDetector, StripeDetector),
    *(TelegramBotTokenDetector, TwilioKeyDetector),
)
_LOOKS = tuple(look for detector in _DETECTORS for look in detector().denylist)
_MORE = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgithub_pat_\w{22,}|\bsk-(?:[a-z]+-)?[\w-]{20,}|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}"
    r"|(?<![\w=-])eyJ[\w=-]{8,}\.[\w=-]{4,}(?:\.[\w=-]*)?|\bnvapi-[\w-]{40,}|\bgsk_\w{40,}|\br8_\w{30,}|\bwandb_v1_\w{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_WORDS = frozenset(
    {"key", "keys", "token", "secret", "secrets", "pass", "pw", "pwd", "pat", "sas", "jwt", "dsn", "cred", "creds"}
    | {"cookie", "cookies", "netrc", "webhook", "kubeconfig", "xauthority", "krb5ccname"}
)
_GLUED = re.compile(
    r".*(?:password|passwd|passphrase|passcode|secret|credential|authorization)s?"
    r"|.*(?:(?:api|auth|access|account|client|private|secret|service|shared|signing)keys?|token|passfile|pwd)"
    r"|(?:admin|database|db|ftp|key|ldap|mail|mongo|my|mysql|pg|proxy|redis|root|smtp|sql|ssh|sudo|user)pass"
)
_TOKENIZER = frozenset({"bos", "cls", "eos", "eot", "image", "mask", "pad", "sep", "special", "stop", "unk"})
"""Before `token` they make it a piece of text."""
_CONNECTION = re.compile(r"conn(?:ection)?str(?:ing)?")
_NO_SECRETS = frozenset({"PWD", "OLDPWD"})
_SOCKETS = frozenset({"ssh_auth_sock", "gpg_agent_info"})
"""Through them one acts with somebody's keys."""
_WORD_BREAK = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_USERINFO = re.compile(r"(?<=://)(?<!ssh://)[^/\s]*@|(?<=ssh://)[^/\s@]*:[^/\s]*@")
"""The name alone that ssh goes by is none."""
_IN_QUERY = re.compile(r"(?P<start>[?&])(?P<name>[^=&?#\s]+)=(?P<value>[^&#\s]+)")
_SIGNATURES = frozenset({"sig", "signature", "x-amz-signature", "x-goog-signature"})
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)(?:[\"']?\s*=\s*|[\"']\s*:\s*(?=[\"']))"
    r"(?=\"[^\"\n]{4}|'[^'\n]{4}|[^\s;,&'\"]{4})"
)
_VALUE = re.compile(r"\"[^\"\n]{4,}\"|'[^'\n]{4,}'|[^\s;,&'\"]{4,}")
_HEADER = re.compile(
    r"(?P<start>(?i:authorization)[\"']?\s*[:=]\s*[\"']?(?:(?i:basic|bearer|token)\s+)?|\bBearer )\S{6,}"
)
_SECRET_LENGTH = 8
"""Shorter values of variables are words that stand in any text."""


@lru_cache(maxsize=4096)
def names_secret(name: str) -> bool:
    """Whether what has this name is a secret: `DB_PASS`, `apiKey`, `PGPASSWORD`; not `max_new_tokens`, not `PATH`.

    An option `..._env` holds no secret but the name of the variable with it.
    """
    if name.endswith("_env") or name in _NO_SECRETS:
        return False
    if name.lower() in _SOCKETS:
        return True
    words = [word.lower().rstrip("0123456789") for word in _WORD_BREAK.split(name)]
    if _CONNECTION.search("".join(words)) or words[-1:] == ["auth"]:
        return True
    before = ["", *words]
    return any(
        (word in _WORDS or _GLUED.fullmatch(word) is not None) and not (word == "token" and earlier in _TOKENIZER)
        for earlier, word in zip(before, words, strict=False)
    )


def holds_secret(text: str) -> bool:
    """Whether there is a secret in `text` by its looks: a vendor's key, an address with credentials, `password=...`."""
    return _hidden(text) != text


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is a secret by its name or its value."""
    return names_secret(name) or holds_secret(value)


def secrets_in(tree: object, place: str = "") -> Iterator[str]:
    """Dotted places in `tree`, of mappings and lists, that hold secrets."""
    match tree:
        case Mapping():
            for key, value in tree.items():
                inner = f"{place}.{without_secrets(str(key))}".removeprefix(".")
                if holds_secret(str(key)) or (names_secret(str(key)) and value not in (None, "")):
                    yield inner
                else:
                    yield from secrets_in(value, inner)
        case list() | tuple():
            for index, value in enumerate(tree):
                yield from secrets_in(value, f"{place}.{index}".removeprefix("."))
        case str() if holds_secret(tree):
            yield place


def without_credentials(address: str) -> str:
    """`address` with the `user:password@` of every URI in it removed."""
    return _USERINFO.sub("", address)


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without what looks like a secret, and without the values of variables that are secrets by their name.

    The variables are those of this process by default.
    """
    for value in sorted(secret_variables(environment).values(), key=len, reverse=True):
        text = text.replace(value, REDACTED)
    return _hidden(text)


def secret_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that are secrets by their name, of this process by default: for `without_secrets` of many texts."""
    variables = os.environ if environment is None else environment
    return {name: value for name, value in variables.items() if len(value) >= _SECRET_LENGTH and names_secret(name)}


def _hidden(text: str) -> str:
    text = _MORE.sub(REDACTED, without_credentials(text))
    for look in _LOOKS:
        text = look.sub(REDACTED, text)
    text = _HEADER.sub(rf"\g<start>{REDACTED}", text)
    return _without_assigned(_IN_QUERY.sub(_hide_value, text))


def _without_assigned(text: str) -> str:
    """`text` without the values that are assigned to secret names; a value may itself be an assignment.

    A value is looked at where the name is a secret's alone: each may be as long as the text.
    """
    parts: list[str] = []
    done = at = 0
    while match := _ASSIGNED.search(text, at):
        at = match.end()
        value = _VALUE.match(text, at) if names_secret(match["name"]) else None
        if value is not None and value[0] != REDACTED:
            parts += [text[done:at], REDACTED]
            done = at = value.end()
    return "".join([*parts, text[done:]])


def _hide_value(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    if value == REDACTED or not (names_secret(name) or name.lower() in _SIGNATURES):
        return match[0]
    return match[0].removesuffix(value) + REDACTED
