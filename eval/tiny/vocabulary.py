"""A word-level tokenizer for the test models: lower case, every word the scenes and the questions need."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..scenes import COLORS, PLURALS, SHAPES
from ..scenes.desk import SIGN_WORDS
from ..scenes.questions import NUMBERS, PLACES

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<img>", "</img>", "<video>")
WORDS = """
user assistant : ? . , ! ' - yes no not a an the this that these is are was be it its and or of in
on at to with for from by there here do does did you see can any image picture photo scene shown
shows show contain contains describe please help me detail details generate write give short long
brief caption sentence provide provided what which where when how many much color
colour shape shapes object objects thing things kind nothing background answer question using use
single word words phrase only visible appear appears all every list name seen present i we us some
both other another same near next left side corner middle
"""
"""Other words the questions, captions and common prompts need."""

DESK_WORDS = "sign number bar bars tallest shortest chart read"
"""Words of the questions about desks. They come last: a decoder that never met them keeps its ids."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The LLaVA-1.5 conversation: "USER: <image>\\n... ASSISTANT: ...</s>"."""


def vocabulary() -> dict[str, int]:
    """Token to id, special tokens first."""
    words = [
        *SPECIAL,
        *WORDS.split(),
        *SHAPES,
        *PLURALS.values(),
        *COLORS,
        *NUMBERS,
        *" ".join(PLACES).split(),
        *DESK_WORDS.split(),
        *SIGN_WORDS,
        *"0123456789",
    ]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all three models, with the attributes that the stock processors ask for."""
    core = Tokenizer(WordLevel(vocabulary(), unk_token="<unk>"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = Whitespace()
    core.decoder = WordPiece(cleanup=True)
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={
            "image_token": "<image>",
            "context_image_token": "<image>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    )
