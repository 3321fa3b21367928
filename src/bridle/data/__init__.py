"""Rows, domains, prompts and rollouts: everything that is read from or kept in files of text."""

from bridle.data.corpus import DOMAIN, Domain, mix, tokenize_domain
from bridle.data.encoding import decode_parts, encode_completion, encode_prompt
from bridle.data.labels import VerbalisedLabel, labelled_texts
from bridle.data.prompts import Prompt, prompts_from_domain, read_prompts
from bridle.data.readers import ROW
from bridle.data.rollouts import Rollout, read_rollouts, write_rollouts
from bridle.data.source import DataSource, texts_of

__all__ = [
    "DOMAIN",
    "ROW",
    "DataSource",
    "Domain",
    "Prompt",
    "Rollout",
    "VerbalisedLabel",
    "decode_parts",
    "encode_completion",
    "encode_prompt",
    "labelled_texts",
    "mix",
    "prompts_from_domain",
    "read_prompts",
    "read_rollouts",
    "texts_of",
    "tokenize_domain",
    "write_rollouts",
]
