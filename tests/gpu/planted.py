"""Errors that tests plant into the PTX of a kernel."""

import re

BARRIER = r"bar\.sync\s+0;"
WAIT = r"cp\.async\.wait_group\s+(\d+);"
COMMIT = r"cp\.async\.commit_group;"


def replaced(pattern, number, by):
    """An edit that replaces one occurrence; by: text, or a function of the match."""

    def edit(text):
        found = list(re.finditer(pattern, text))
        if number >= len(found):
            return text
        match = found[number]
        return text[: match.start()] + (by(match) if callable(by) else by) + text[match.end() :]

    return edit


def one_more(match):
    """A wait that lets one more group be under way."""
    return f"cp.async.wait_group {int(match[1]) + 1};"


def without_masks(kind):
    """An edit that makes every ld.global or st.global of a kernel act in all threads."""
    return lambda text: re.sub(rf"@!?%p\d+ ({kind}\.global)", r"\1", text)


def without_reset(text):
    """The counter of programs that have arrived is left as it is: the store to the address of the atomic is gone."""
    found = re.search(r"atom\.global\S* %r\d+, \[ (%rd\d+)", text)
    if not found:
        return text
    changed, count = re.subn(rf"@?%?p?\d* ?st\.global\.b32 \[ {found[1]} \+ 0 \][^;]*;", "", text)
    assert count == 1
    return changed


def without_partial_sums(text):
    """The first store to global memory of a kernel that splits its sums, which is of partial sums, is gone."""
    if "atom.global" not in text:
        return text
    return re.sub(r"@%p\d+ st\.global[^;]*;", "", text, count=1)
