"""Give pages of the cache to sequences, the same ones to sequences that begin alike. Plain Python, no jax.

A full page of a prompt is known by its tokens and the page before it, so a path of known pages is a prefix (as the
radix tree of Zheng et al. 2024, "SGLang", section 3). Sequences share it, and it stays after they have ended until its
place is needed: the prefix used longest ago goes first. Pages of answers are not shared: decoding rounds otherwise than
reading a prompt, and an answer must not depend on whether somebody else wrote its beginning.

A sequence gets the pages of its prompt and of its longest answer at once, so no sequence runs out of pages while it is
decoded, none has to be interrupted, and one that waits for pages gets them when others end. Where a model rotates long
sequences by other factors (`layers/rope/by_length.py`), these share no pages with short ones. Read `requests.py` next.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_Key = tuple[int, tuple[int, ...]]


@dataclass(kw_only=True)
class _Page:
    """A page: how many sequences have it, and how others find it: None for a page that is not shared.

    Args:
        serial: number of the content, never used again, by which the next page of a prefix names this one.
        is_read: whether its tokens have been given to the devices.
    """

    num_users: int = 0
    key: _Key | None = None
    serial: int = 0
    is_read: bool = False


class PagePool:
    """The pages of one data shard.

    Args:
        long_from: sequences of more tokens share no pages with shorter ones; 0 if all may share theirs.

    >>> pool = PagePool(num_pages=4, page=2)
    >>> first = pool.take((1, 2, 3), num_tokens=4)
    >>> second = pool.take((1, 2, 5), num_tokens=4)  # begins with the same page
    >>> first, second, pool.take((7,), num_tokens=4)
    ([0, 1], [0, 2], None)
    """

    def __init__(self, *, num_pages: int, page: int, long_from: int = 0) -> None:
        self.page, self.long_from = page, long_from
        self._pages = [_Page() for _ in range(num_pages)]
        self._free = list(reversed(range(num_pages)))
        # Known pages that no sequence has, the one used longest ago first.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._known: dict[_Key, int] = {}
        self._num_serials = 0

    @property
    def num_free(self) -> int:
        """Number of pages that no sequence has, with those that keep a prefix."""
        return len(self._free) + len(self._kept)

    def num_shared(self, prompt: Sequence[int], *, num_tokens: int = 0) -> int:
        """Return the number of tokens at the beginning of a prompt whose pages are known, as of `take`."""
        return len(self._find(prompt, self._root(num_tokens))) * self.page

    def take(self, prompt: Sequence[int], *, num_tokens: int) -> list[int] | None:
        """Return pages for a sequence of so many tokens, its prompt included, or None if there are too few."""
        root = self._root(num_tokens)
        shared = self._find(prompt, root)
        num_new = -(-num_tokens // self.page) - len(shared)
        if num_new > self.num_free - sum(number in self._kept for number in shared):
            return None
        for number in shared:
            self._kept.pop(number, None)
        pages = shared + [self._take_one() for _ in range(num_new)]
        for number in pages:
            self._pages[number].num_users += 1
        self._name(pages, prompt, first=len(shared), root=root)
        return pages

    def mark_read(self, pages: Sequence[int], *, num_tokens: int) -> None:
        """Note that the first tokens of a prompt, in these pages, have been given to the devices."""
        for number in pages[: num_tokens // self.page]:
            self._pages[number].is_read = True

    def num_read(self, pages: Sequence[int], prompt: Sequence[int]) -> int:
        """Return the number of tokens of a prompt that its pages hold already; at least one is left to read."""
        count = 0
        for number in pages[: self._num_shareable(prompt)]:
            if not self._pages[number].is_read:
                break
            count += 1
        return count * self.page

    def give_back(self, pages: Sequence[int]) -> None:
        """Take pages back from a sequence; a prefix that others may begin with is kept."""
        # The end of a prefix before its beginning, without which nobody finds it.
        for number in reversed(pages):
            own = self._pages[number]
            own.num_users -= 1
            if own.num_users:
                continue
            if own.key and own.is_read:
                self._kept[number] = None
            else:
                self._forget(number)
                self._free.append(number)

    def forget(self, pages: Sequence[int]) -> None:
        """Let no further sequence begin with these pages, whose content is not to be trusted."""
        for number in pages:
            self._forget(number)

    def _root(self, num_tokens: int) -> int:
        """Return the serial before the first page of a sequence: serials of pages are above 0."""
        return -1 if self.long_from and num_tokens > self.long_from else 0

    def _find(self, prompt: Sequence[int], root: int) -> list[int]:
        """Return the known pages with which a prompt begins; its last token is in none, since it must be computed."""
        found, serial = [], root
        for index in range(self._num_shareable(prompt)):
            number = self._known.get((serial, self._tokens(prompt, index)))
            if number is None:
                break
            found.append(number)
            serial = self._pages[number].serial
        return found

    def _name(self, pages: Sequence[int], prompt: Sequence[int], *, first: int, root: int) -> None:
        """Make the full pages of a prompt known, from page `first` on."""
        serial = self._pages[pages[first - 1]].serial if first else root
        for index in range(first, len(prompt) // self.page):
            key, own = (serial, self._tokens(prompt, index)), self._pages[pages[index]]
            if key in self._known:
                break
            self._num_serials += 1
            own.key, own.serial = key, self._num_serials
            self._known[key] = pages[index]
            serial = own.serial

    def _take_one(self) -> int:
        if self._free:
            return self._free.pop()
        number, _ = self._kept.popitem(last=False)
        self._forget(number)
        return number

    def _forget(self, number: int) -> None:
        own = self._pages[number]
        if own.key:
            del self._known[own.key]
        own.key, own.is_read = None, False

    def _num_shareable(self, prompt: Sequence[int]) -> int:
        return (len(prompt) - 1) // self.page

    def _tokens(self, prompt: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(prompt[index * self.page : (index + 1) * self.page])
