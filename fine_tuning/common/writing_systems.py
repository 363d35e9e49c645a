"""How scripts write what is searched for: ASCII forms of equal length, and the edges of values beside words.

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces, and Korean adds particles to words (UAX #29,
section 4): a letter of these scripts beside a value is its neighbour, not a part of it.
"""

import re
import unicodedata

# for use within [ ]
_CJK = r"\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and ideographs
_HANGUL = r"\uac00-\ud7a3"
WORDLIKE = _CJK + _HANGUL  # a character says about as much as a word of another script
# without spaces between words: Thai to Tibetan, Burmese and Khmer as well
NO_SPACES = r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff" + _CJK
UNSPACED = NO_SPACES + _HANGUL  # without a space beside a value
WORD = rf"[^\W{UNSPACED}]"  # a character that cannot stand beside a value
# what ends a value in these scripts: their letters, their punctuation, full-width forms
ENDS_VALUE = UNSPACED + r"\u3000-\u303f\uff00-\uffef"
# names of numbers that are no cards and no phones, and what joins a name to its value, written without spaces
OTHER_NUMBERS = (
    r"(?:第|(?:注文|伝票|追跡|受付|会員)番号|(?:订单|訂單|快递|快遞|运单|單|单)[编編]?[号號]?[码碼]?|[编編][号號]|[学學][号號]|"
    r"(?:주문|송장)번호)"
)
JOINED = r"[はがの是為为은는이가คือ:：\s]{0,4}"
_MAY_HAVE_FORMS = re.compile(r"[^\x00-\u065f\u2000-\u2fff]")
_ALNUM = "[0-9A-Za-z\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]"
# digits of any script (general category Nd), full-width letters, and full-width signs within a value only: elsewhere
# they are punctuation of the sentence
_FORM = re.compile(
    rf"[^\D0-9]|[\uff20\uff21-\uff3a\uff41-\uff5a]|\uff0b(?=\d)|(?<={_ALNUM})[\uff0d\uff0e\uff1a\uff3f](?={_ALNUM})"
    r"|\uff08(?=\d{2,5}\uff09)|(?<=\d)\uff09(?=[\d\s\uff0d-])"
)


def ascii_forms(text: str) -> str:
    """The text with digits of other scripts and full-width forms as ASCII, each one character, so that places stay."""
    if text.isascii() or not _MAY_HAVE_FORMS.search(text):
        return text
    return _FORM.sub(lambda match: _ascii(match.group()), text)


def _ascii(form: str) -> str:
    return str(unicodedata.decimal(form)) if form.isdecimal() else chr(ord(form) - 0xFEE0)


_WORD = re.compile(rf"[{NO_SPACES}]|[^\W{NO_SPACES}]+")


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation; characters of scripts that write no spaces between words."""
    return _WORD.findall(text.casefold())
