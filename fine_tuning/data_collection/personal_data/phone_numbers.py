"""Phone numbers in text: groups of digits as candidates, libphonenumber as the judge."""

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING
from zoneinfo import available_timezones

from fine_tuning.common.writing_systems import JOINED, OTHER_NUMBERS, WORD

if TYPE_CHECKING:
    from phonenumbers import PhoneNumber

_BETWEEN = r"(?:\)[ -]?\(?|\(| ?[-–/\u2010\u2011\u2212\uff0d] ?\(?|[ .\u00a0]\(?)"  # digits of a number
_INTERNATIONAL = re.compile(rf"(?<!{WORD})(?<!\+)(?<!\d[.,])(?:\(\+|\+\(?|\(?00(?=[1-9]))\d++(?:{_BETWEEN}\d++)*+")
_NATIONAL_PHONE = re.compile(
    rf"(?<!{WORD})(?<![.,/#$€£&+-])(?=[\d() .\u00a0\u2010\u2011\u2212\uff0d–/-]{{7}})"
    rf"\(?\d++(?:{_BETWEEN}\d++)*+"
)
_MOST_GROUPS = 8
_AMERICAN = re.compile(r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])\d{3}[ .-]\d{4}")
_MARK_BEFORE = re.compile(r"[:：.=#\"'`(*]\s{0,2}$|\b(?:is|ist|est|es|[èé]|[äe]r|to|je)\s$", re.IGNORECASE)
_EXTENSION = re.compile(
    r"(?:\s{0,2}|, |;)(?:ext(?:ension|n)?\.?|x|#|durchwahl|poste)(?:\s{0,2}|: |=)\d{1,6}(?!\w)", re.IGNORECASE
)
_CALLED_A_PHONE = re.compile(
    r"\b(?:phone|tel|telephone|mobile|cell|cellphone|call|text|sms|whatsapp|signal|fax|dial|ring|reach|contact|hotline|"
    r"telefon\w{0,9}|handy\w{0,8}|mobilnummer|rufnummer|ruf|rufen|anrufen|durchwahl|t[ée]l[ée]phone|portable|"
    r"appele[zr]|"
    r"appelle|joindre|tel[ée]fono|m[óo]vil|celular|telem[óo]vel|telefone|cellulare|telefoon\w{0,7}|kom[óo]rk[aię]|"
    r"(?:my|his|her|our|their|your) (?:new )?number|(?:meine|deine|seine|ihre|unsere) (?:neue )?nummer|"
    r"(?:mon|ton|son|notre|votre) num[ée]ro)\b[^\d\n]{0,24}$",
    re.IGNORECASE,
)
# what stands on cards, in forms and in code right before a number: unlike a verb it says phone in any country
_LABELLED_A_PHONE = re.compile(
    r"(?:(?:(?<![^\W_])(?:(?:phone|telephone|telefon|t[ée]l[ée]phone|tel[ée]fono|telefone|telefoon|telem[óo]ve[li]|"
    r"mobiltelefon|"
    r"handy|cell ?phone|whatsapp|celular|cellulare|rufnummer|телефон|puhelin|τηλέφωνο)[^\W\d]{0,12}|"
    r"tel|tél|telf|tfno|landline|kom|t[ée]l[ée]f|tlf|tlfn|tfn|ph|mob|mobile?|mobiel|mobilnummer|mobilnr|cell?|fone|fax|"
    r"gsm|natel|puh|моб|тел|(?:по)?звоните|τηλ|κιν|טלפון|נייד|הטלפון|هاتف|جوال|الهاتف)|(?<=[a-z])(?-i:Phone|Mobile|"
    r"Tel|Fax)(?:Number|No|Nr)?)"
    r"\.?(?:[\s_/-]{0,2}(?:number|no|num|nr|numer|n[úu]mero|num[ée]ro|nummer|n[º°]|phone|mobile|m[óo]vil|kom[óo]rkowy|"
    r"work|home|office|priv(?:at|é)|celular)\b\.?){0,3}(?:\s?\([^()\d\n]{1,16}\)|\s(?:para|de|di|per)\s[^\W\d_]{3,10})?"
    r"(?:\s(?:is|ist|est|es|is|è|é|to|er|är|lautet))?[\s\"'*`:=.：#(\[|-]{0,8}"
    r"|(?:電話|电话|手机|手機|携帯|ファックス|ケータイ|전화|휴대폰|휴대전화|핸드폰|연락처)(?:番号|號碼|号码|号|\s?번호)?[はのは是為为은는:：\s]{0,4})$",
    re.IGNORECASE,
)
# Somebody's number in a sentence, which may be one of any country too: whose it is, ...
_WHOSE = (
    r"(?:(?:mio|tuo|suo|nostro|vostro)(?: nuovo)? numero|(?:mi|tu|su|nuestro)(?: nuevo)? n[úu]mero|"
    r"(?:meu|teu|seu|nosso)(?: novo)? (?:n[úu]mero|zap|whats)|"
    r"(?:mijn|jouw|zijn|haar|ons|onze)(?: nieuwe)? (?:06-?)?nummer|(?:m[óo]j|tw[óo]j|jego|jej|nasz)(?: nowy)? numer|"
    r"(?:mitt|ditt|mit|dit|hans|hennes|hendes|vårt)(?: ny[ae])? (?:mobil)?nummer|"
    r"(?:moje|tvoje|jeho|její|naše)(?: nov[ée])? [čc][íi]slo|(?:m[ůu]j|m[ôo]j|tv[ůu]j|její|jeho) mobil|"
    r"(?:benim )?(?:cep )?numara(?:m|mız|sı)|hatt[ıi]m(?:[ıi]z)?|(?-i:[Cc]ep)|(?:мой|мій|его|её|наш|"
    r"твой)(?: новый)? номер|"
    r"номер (?:мам|пап|муж|жен|сын|доч|брат|сестр|бабушк|дедушк)\w{1,3}|αριθμός μου|számom|numărul meu|numeroni|"
    r"(?:mon|ton|son|notre|votre)(?: nouveau)? num[ée]ro|(?:n[úu]mero d(?:[eiao]|el|ella) (?:m[ií][aeo]? |meu |"
    r"minha )?|"
    r"n[úu]mero del|num[ée]ro d(?:e |')|nummer v[ao]n |numer do |číslo na )(?-i:[A-ZÀ-ÞŁŚŻ])?[^\W\d_]{1,20})"
    r"(?:\s(?:[èé]|es|est|is|ist|to|je|[äe]r|on|este|είναι|le|el|il|o|c'est|jest)){0,2}"
)
# ... or a word for calling and reaching, and what stands between it and the number
_REACHED = (
    r"(?:joignables?|(?:r?appel|contact|t[ée]l[ée]phon)(?:e|es|er|ez)|joindre|raggiungibil[ei]|(?:ri)?chiam\w{1,6}|"
    r"telefon(?:a|ami|are|ate|eer|ere)|contatt\w{1,6}|recapit\w{1,8}|scriv(?:i|e|ete|er)(?:mi|ci)|ll[áa]m\w{1,6}|"
    r"locali[zc]\w{0,4}(?:me|nos|le)|"
    r"cont[áa]ct\w{1,7}|m[áa]nd[ae](?:me|nos|le|n)|escr[íi]b[aei]r?(?:me|nos|le)|ligu?[ea]r?|fal[ea]r? (?:com|"
    r"conosco)|chamar?|bel(?:len|t)?|"
    r"bereik\w{1,5}|app(?= (?:me|mij|ons))|(?:za|od)?dzwo[nń]\w{0,4}|dost[ęe]pn[yai]|kontakt\w{0,4}|"
    r"(?:napi[sš]\w{0,2}|пиши(?:те)?)(?= (?:sms|do|mi|mu|мне|в|на)\b)|"
    r"ring(?:a|er)?|n[åa]r?s?(?= (?:mig|meg|oss|på))|f[åa] fat i|zavol\w{1,6}|vol(?:ej|at)\w{0,3}|"
    r"(?:по)?(?:звон|дзвон)\w{1,5}|связаться|aray[ıi]n\w{0,4}|ula[şs]\w{1,12}|whats ?app|в[оа]тсап\w{0,2}|sms|"
    r"erreich\w{1,5}|anruf\w{0,4}|bell|voicemail|get hold of|soit[at]\w{0,4}|hívj\w{0,3}|sun[aă]\w{0,4}|gọi|hubungi|"
    r"telpon)"
    r"(?:[\s,-]{1,2}(?:me|moi|mi|mij|mig|meg|mnie|mn[eě]|mir|mich|n?ous|nos|noi|ons|oss|uns|him|her|them|con|nosotros|"
    r"conosco|"
    r"au|aux|[ao]l?|ao|à|op|på|sur|pel[oa]|n[oa]|em|en|para|por|pod|naar|til|till|do|k|к|на|по|в|мне|нам|через|unter|"
    r"at|on|"
    r"le|la|el|il|het|numer\w{0,2}|n[úu]mero|num[ée]ro|nummer|[čc][íi]slo|номер\w?|numara\w{0,4}|whatsapp|вотсап\w?|"
    r"sms|een|"
    r"ett?|une?|uma|gerne|g[äa]rna|можно|telefon\w{0,4}|i|mit|nu|even)){0,4}"
)
_UNSPACED_WORDS = (
    r"(?:(?:[拨撥致]|请打|給我打|请|来)[打电電]?[话話]?|[联聯][系繫络絡](?:方式|人|我)?|微信(?:同[号號])?|連絡先|"
    r"問い合わせ|"
    r"(?:的|(?<![\u4e00-\u9fff]))(?:[号號][码碼]|番号)|(?:내|제|우리|엄마) 번호|문의|연락)"
)
_SAID_TO_BE_A_PHONE = re.compile(
    rf"(?<![^\W_])(?:{_WHOSE}|{_REACHED})[\s:：\"'*(-]{{1,4}}$|{_UNSPACED_WORDS}{JOINED}$", re.IGNORECASE
)
_WORD_BEFORE = re.compile(r"[^\W\d_][\s:：\"'*(-]{0,4}$")
_SAID_AFTER = re.compile(
    r"\s?(?:[にへ](?:お)?電話|まで(?:お|ご)?(?:電話|連絡|問)|(?:으)?로 (?:전화|연락|문자|카톡)|numara(?:s[ıi]n)?dan|"
    r"找我|联系我|anrufen|zurückrufen|is (?:my|his|her|their|our|the) (?:new )?(?:phone|cell|mobile|number))"
)
# "Anna: 4156667777"; Chinese names begin with one of the usual surnames, and these words are no names
_PERSON = re.compile(r"(?:^|[\n,;(•*-])\s{0,3}([^\W\d_]{2,20})(?: [^\W\d_]{2,20})?\s?[:：]\s{0,2}$")
_SURNAMES = "王李张張刘劉陈陳杨楊赵趙黄周吴吳徐孙孫胡朱高林何郭马馬罗羅梁宋郑鄭谢謝韩韓唐冯于董萧程曹袁邓許沈曾彭蘇"
_NO_PERSONS = (
    " number numbers nummer numero número numéro numer номер num nr no total totale count sum summe somma suma сумма "
    "gesamt amount betrag montant importe importo price preis prix precio prezzo cost kosten revenue sales profit "
    "income salary budget balance account konto compte cuenta conto population users followers subscribers views "
    "likes downloads votes max min maximum minimum average mean median seed timestamp epoch time date datum year size "
    "length width height weight distance area volume speed offset limit index key value wert valeur valor id ids uid "
    "pid code hash checksum bytes memory version build serial barcode isbn ean upc sku model part lot batch order "
    "invoice ticket tracking reference ref case item product result results resultat résultat resultado risultato "
    "ergebnis wynik answer antwort réponse respuesta solution output input expected actual example test score points "
    "rank rate range start end first last next step page line row column prime random integer data status error "
    "address port patent license licence registration passport policy contract claim customer client kunde employee "
    "student member quantity anzahl nombre cantidad zahl factor difference capacity energy "
)
_ALSO_PEOPLE = set("Adelaide Casey Chad Davis Georgia Israel Jordan Regina Santiago Sofia Sydney".split())  # noqa: SIM905
# fmt: off
_ANY_COUNTRY = (
    "US", "GB", "DE", "FR", "IN", "AU", "NZ", "IE", "CA", "ZA", "BR", "PT", "ES", "MX", "AR", "CO", "IT", "NL", "BE",
    "CH", "AT", "PL", "CZ", "HU", "RO", "GR", "SE", "NO", "DK", "FI", "RU", "UA", "TR", "IL", "AE", "SA", "JP", "CN",
    "KR", "TW", "HK", "SG",
)
# fmt: on
# Kept free for fiction or given to nobody: invalid, but written for numbers in examples (NANPA, Ofcom, ARCEP)
_FICTION = {
    1: re.compile(r"555\d{7}"),
    33: re.compile(r"63998\d{4}"),
    44: re.compile(r"(?:7700900|1632960|3069990)\d{3}"),
}
_CALLED_OTHERWISE = re.compile(
    r"\b(?:order|invoice|tracking|isbn(?:-1[03])?|issn|ean|upc|sku|serial|model|part|case|ticket|ref(?:erence)?|id|"
    r"imei|version|"
    r"account|page|pages|pp|doi|rfc|iso|figure|timestamp|port|zip|code|error|bug|issue|build|date|patent|"
    r"card|social security|bestell\w{0,8}|auftrag\w{0,8}|rechnung\w{0,8}|sendung\w{0,8}|kunden\w{0,8}|konto\w{0,8}|"
    r"aktenzeichen|vorgang\w{0,8}|artikel\w{0,8}|serien\w{0,8}|commande|facture|dossier|siret|siren|pedido|factura|"
    r"ordine|"
    r"fattura|zam[oó]wieni\w{0,3}|faktur[ay]|bestelling|factuur|encomenda|ordem|fatura|r[ée]f[ée]rence|r[ée]f|"
    r"(?:order|bestel|klant|factuur|ordre|kunde|faktura)nummer|(?:buchungs|mitglieds|vertrags|versicherungs|"
    r"ticket)-?nummer|"
    r"batch|lot|flight|room|zimmer|quote|confirmation|claim|item|licen[cs]e|reservation|booking|policy|transaction|"
    r"n[uú]m[eé]ro\s(?:d[eo]s?\s|d[ia]\s|d')(?!t[eé]l|portable|mobile|cel|m[óo]v|whats|contac|m[ií][aeo]?\b|meu|minha|"
    r"(?-i:[A-ZÀ-Þ]))\w{2,20}|(?:sipariş|müşteri|fatura|takip|dosya|hesap|kimlik) num\w{3,8}|has|hat|tiene|"
    r"(?:func?[tc]i[oó]n|fonction|funktion|funzione)(?: \w{3,4})?|"
    r"barcode|asin|s/n|sn|p/n|vin|cat|catalog(?:ue)?|"
    r"(?:customer|member(?:ship)?|employee|student|contract|meter)\s?(?=number|no\b|nr|id|#))"
    r"(?:[\s-]?(?:number|no|num|nr|id|code|n[º°]))?(?:\s(?:is|was|ist|est|lautet|es|[èé]|[äe]r|to|je))?\.?[^\w\n]{0,4}$"
    rf"|{OTHER_NUMBERS}{JOINED}$",
    re.IGNORECASE,
)
_DATE_ISBN_OR_SUM = re.compile(
    r"(?:(?:19|20)\d{2}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d{2})(?:$|[ T(-])"
    r"|(?:19|20)\d{2} ?- ?(?:19|20)\d{2}$|97[89][- ]?\d(?!\d\d[- .]\d{4}$)"
    r"|[1-9]\d?(?:[ .\u00a0]\d{3}){2,4}$|[1-9][\d .\u00a0]{0,12}(?:0[ .\u00a0]?){4}0$"
    r"|\d{5}-\d{3,4}$"  # postcodes of Brazil and of the United States
)


def find_phones(text: str, regions: tuple[str, ...], taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Phone numbers; digits inside what is `taken` already (a card, an IBAN) are not asked again."""
    for pattern, possible in ((_INTERNATIONAL, ()), (_NATIONAL_PHONE, regions)):
        if pattern is _INTERNATIONAL and "+" not in text and "00" not in text:
            continue
        for run in pattern.finditer(text):
            first, last = run.span()
            if any(start <= first and last <= end for start, end in taken):
                continue
            for start, end in _phones_of_run(text, first, last, possible):
                extension = _EXTENSION.match(text, end)
                yield start, extension.end() if extension else end


def _phones_of_run(text: str, start: int, end: int, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Phone numbers that follow each other from the start of a run of groups of digits.

    The longest sequence of groups that is a number counts, else the longest that can be one by what stands before it.
    What follows no number is none: figures in a table.
    """
    groups = [group.span() for group in _GROUP.finditer(text, start, end)]
    if _WORD_GOES_ON.match(text, end) and not _EXTENSION.match(text, end):  # 0544 056B
        groups.pop()
    if len(groups) > 1 and text[groups[0][1]] == ")" and text[start] not in "(+":  # 1) 650-253-0000
        del groups[0]
        start = groups[0][0] - (text[groups[0][0] - 1] == "(")
    if groups and text.startswith(("978", "979"), groups[0][0]) and sum(b - a for a, b in groups) == 13:  # an ISBN
        return
    if not groups or groups[-1][1] - groups[0][0] < 7 or _NO_PHONE_BEFORE.match(text, end):
        return
    first = 0
    while first < len(groups):
        sequences = list(_sequences(text, start, groups[first : first + _MOST_GROUPS]))
        sequences.sort(key=lambda item: _AMERICAN.fullmatch(item[0][0]) is None)  # it is whole, whatever follows
        found = next((item for item in sequences if _is_phone(*item[0], regions)), None)
        if found and found[3] < len(groups) - first == sequences[0][3]:  # a part, where the whole may be of elsewhere
            context, *_ = sequences[0]
            value = context[0]
            usual = sum(map(str.isdigit, value)) <= 11 and not value.startswith(("+", "(+"))
            found = sequences[0] if usual and _can_be_phone(*context) else found
        found = found or next((item for item in sequences if _can_be_phone(*item[0])), None)
        if found is None:
            return
        _, begin, stop, count = found
        yield begin, stop
        first += count
        start = groups[first][0] if first < len(groups) else end
        start -= start > 0 and text[start - 1] == "("


def _sequences(text: str, start: int, groups: list[tuple[int, int]]) -> Iterator[tuple[tuple[str, ...], int, int, int]]:
    """((value, before, after), begin, end, count of groups) of those of a number's length, longest first."""
    for count in range(len(groups), 0, -1):
        stop = groups[count - 1][1]
        # An opening parenthesis that closes after the number is the sentence's.
        begin = start + (text[start] == "(" and text.count("(", start, stop) > text.count(")", start, stop))
        if 7 <= sum(b - a for a, b in groups[:count]) <= 15:
            yield (text[begin:stop], text[max(0, begin - 60) : begin], text[stop : stop + 24]), begin, stop, count


def _is_phone(value: str, before: str, after: str, regions: tuple[str, ...]) -> bool:
    """Valid for its country, and either international, or written the way the country writes it, or called a phone."""
    if _is_no_phone(value):
        return False
    if value.startswith(("+", "(+")):
        return _parse(value, None) is not None
    called = _called(before, after)
    if called == "other":
        return False
    if value.startswith(("00", "(00")):
        return _parse("+" + value.lstrip("(")[2:], None) is not None
    if not called and (value.isdigit() or before.endswith("=")):
        return False
    count = sum(map(str.isdigit, value))
    for region in regions:
        prefix, lengths = _numbering(region)
        if count not in lengths or (prefix == "0" and not called and value.lstrip("(")[0] != "0"):
            continue
        number = _parse(value, region)
        if number is None:
            continue
        if called:
            return True
        national = str(number.national_number)
        groups = [national[:3]] if prefix == "1" else _GROUP.findall(_national_format(number))
        written = _GROUP.findall(value)
        if prefix == "0" and len(groups) == 2 and groups[1][0] == "0":
            continue  # no number after the area code starts with the prefix of long-distance calls
        if written[0] in ("1", "0") and len(written) > 2:  # the trunk prefix, written apart
            written = written[1:]
        if len(written) > 1 and (written[0] == groups[0] or _is_mobile_code(written[0], groups[0], number)):
            return True
    return False


def _can_be_phone(value: str, before: str, after: str) -> bool:
    """Valid in any country behind a word that says phone, or with a country's code in its groups and of its length.

    The numbers that people make up for an example are seldom given out: +1 555 123 4567, +49 123 456789.
    """
    called = _called(before, after)
    if called == "other" or _is_no_phone(value):
        return False
    labelled = called in ("label", "said")
    if value.startswith(("+", "(+")):
        grouped = len(_GROUP.findall(value)) >= 3
        return (labelled or grouped) and _is_possible(value)
    count = sum(map(str.isdigit, value))
    if value.isdigit() and count < 9 and called != "said" and not _MARK_BEFORE.search(before):  # cell 12345678
        return False
    return labelled and any(count in _numbering(region)[1] and _parse(value, region) for region in _ANY_COUNTRY)


@lru_cache(maxsize=4)  # the sequences of a run stand behind the same
def _called(before: str, after: str) -> str:
    """What it is called: by a "label" of phones, "said" in a sentence, a "word" for calling, an "other", or nothing."""
    if _CALLED_OTHERWISE.search(before):
        return "other"
    if _LABELLED_A_PHONE.search(before):
        return "label"
    if _WORD_BEFORE.search(before) and (_SAID_TO_BE_A_PHONE.search(before) or _is_persons(before)):
        return "said"
    if _SAID_AFTER.match(after):
        return "said"
    return "word" if _CALLED_A_PHONE.search(before) else ""


def _is_persons(before: str) -> bool:
    """Whether a name of a person and a colon stand before a number."""
    name = _PERSON.search(before)
    if name is None:
        return False
    word = name.group(1)
    if word[0] in _SURNAMES:
        return len(word) <= 3
    return word.istitle() and f" {word.lower()} " not in _NO_PERSONS and word not in _places()


@cache
def _places() -> frozenset[str]:
    """Countries, in many languages, and cities that name a time zone, without those that are names of people."""
    from phonenumbers.geodata.locale import LOCALE_DATA

    cities = {zone.rpartition("/")[2] for zone in available_timezones() if "/" in zone}
    countries = {name for names in LOCALE_DATA.values() for name in names.values()}
    return frozenset(cities | countries) - _ALSO_PEOPLE


def _is_no_phone(value: str) -> bool:
    """Unbalanced parentheses, a date, years, an ISBN, or a sum."""
    return value.count("(") != value.count(")") or _DATE_ISBN_OR_SUM.match(value) is not None


def _is_mobile_code(written: str, area: str, number: "PhoneNumber") -> bool:
    """Whether people write the code of a mobile network shorter than it is formatted: 0151 for the German 01512."""
    from phonenumbers import PhoneNumberType, number_type

    return len(written) >= 4 and area.startswith(written) and number_type(number) == PhoneNumberType.MOBILE


_GROUP = re.compile(r"\d+")
_WORD_GOES_ON = re.compile(r"[A-Za-z]")
_NO_PHONE_BEFORE = re.compile(r"[%°€$£_]|-[A-Za-z]")


@cache
def _numbering(region: str) -> tuple[str, frozenset[int]]:
    """(trunk prefix, how many digits a number dialled within the region can have) by libphonenumber's metadata."""
    from phonenumbers import PhoneMetadata

    metadata = PhoneMetadata.metadata_for_region(region, None)
    if metadata is None:
        return "", frozenset()
    prefix = metadata.national_prefix or ""
    lengths = metadata.general_desc.possible_length
    return prefix, frozenset(lengths) | frozenset(length + len(prefix) for length in lengths)


def _parse(value: str, region: str | None) -> "PhoneNumber | None":
    """The number, if it is a valid one, or one for fiction."""
    import phonenumbers

    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None
    fiction = _FICTION.get(number.country_code)
    if phonenumbers.is_valid_number(number) or (fiction and fiction.fullmatch(str(number.national_number))):
        return number
    return None


def _is_possible(value: str) -> bool:
    """Whether a number has a country's code, a length that is usual there, and no row of zeros like a sum."""
    import phonenumbers

    try:
        number = phonenumbers.parse(value)
    except phonenumbers.NumberParseException:
        return False
    digits = str(number.national_number)
    usual = 8 <= len(digits) <= 11 and not number.italian_leading_zero and (number.country_code != 1 or digits[0] > "1")
    return usual and len(set(digits)) > 2 and phonenumbers.is_possible_number(number)


def _national_format(number: "PhoneNumber") -> str:
    """How its own country writes the number."""
    from phonenumbers import PhoneNumberFormat, format_number

    return format_number(number, PhoneNumberFormat.NATIONAL)
