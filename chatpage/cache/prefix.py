"""The content tree: where to find a block by what it holds.

    root ── (system) "You are …" ── (system) "… ask me." tail, 7 tokens
                       │
                       ├── (session a) "… ask me. What is" ── (session a) " a block?" …
                       └── (session b) "… ask me. Why" …

A path from the root spells a prefix. Each node is one published block, keyed by the *sharing domain* and the exact
tokens, compared token by token: two different prefixes can never be taken for each other, and a session finds nothing
below a key of another session's domain.
"""

from collections.abc import Hashable, Iterator, Sequence

SYSTEM: Hashable = "system"  # the domain of operator-owned system prompts


class Node:
    """One published block: the tokens in it, below everything that its parents hold.

    `block` is 0 once the node has left the tree; whoever still points at it must not publish below it.
    """

    __slots__ = ("block", "children", "domain", "parent", "tokens")

    def __init__(self, parent: "Node | None", domain: Hashable, tokens: tuple[int, ...], block: int) -> None:
        self.parent = parent
        self.domain = domain
        self.tokens = tokens
        self.block = block
        # By domain and first token: a search for the longest common head looks only at children that can have one.
        self.children: dict[tuple[Hashable, int], dict[tuple[int, ...], Node]] = {}

    def child(self, domain: Hashable, tokens: tuple[int, ...]) -> "Node | None":
        return self.children.get((domain, tokens[0]), {}).get(tokens)

    def longest_head(self, domain: Hashable, tokens: tuple[int, ...]) -> tuple["Node | None", int]:
        """The child that begins with the most of `tokens`, and how many that are."""
        exact = self.child(domain, tokens)
        if exact is not None:
            return exact, len(tokens)
        best, length = None, 0
        for child in self.children.get((domain, tokens[0]), {}).values():
            common = common_length(child.tokens, tokens)
            if common > length:
                best, length = child, common
        return best, length

    def descendants(self) -> Iterator["Node"]:
        """All nodes below this one, parents before children. A long prompt is a deep tree, so no recursion."""
        stack = [self]
        while stack:
            children = [child for bucket in stack.pop().children.values() for child in bucket.values()]
            yield from children
            stack += children


class PrefixTree:
    """All published blocks of one pool."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.root = Node(None, None, (), -1)

    def find(self, tokens: Sequence[int], domain: Hashable, system_tokens: int = 0) -> list[tuple[Node, int]]:
        """The longest published prefix of `tokens`: nodes from the root down, each with how many tokens of it match.

        Every match but the last is a whole block. The first `system_tokens` are an operator's system prompt, which is
        found in the domain SYSTEM up to its last token and not one further; all later blocks only in `domain`. Where
        both hold the same, SYSTEM it is: a private block that begins alike must not hide the rest of the prompt.
        """
        found: list[tuple[Node, int]] = []
        node, start = self.root, 0
        while start < len(tokens):
            chunk = tuple(tokens[start : start + self.block_size])
            shareable = chunk[: max(0, system_tokens - start)]
            child, length = node.longest_head(SYSTEM, shareable) if shareable else (None, 0)
            if length < len(chunk):
                own, own_length = node.longest_head(domain, chunk)
                if own_length > length:
                    child, length = own, own_length
            if child is None:
                break
            found.append((child, length))
            if length < self.block_size:
                break
            node, start = child, start + self.block_size
        return found

    def insert(self, parent: Node, domain: Hashable, tokens: tuple[int, ...], block: int) -> Node:
        """The node for `tokens` below `parent`: a new one that holds `block`, or the one that is there already."""
        bucket = parent.children.setdefault((domain, tokens[0]), {})
        return bucket.setdefault(tokens, Node(parent, domain, tokens, block))

    def remove(self, node: Node) -> list[int]:
        """Take out a node and all below it, which nobody could find any more. Returns their blocks, its own first."""
        key = (node.domain, node.tokens[0])
        assert node.parent is not None, "the root is not a block"
        bucket = node.parent.children[key]
        del bucket[node.tokens]
        if not bucket:
            del node.parent.children[key]
        gone = [node, *node.descendants()]
        blocks = [n.block for n in gone]
        for n in gone:
            n.block = 0
        return blocks


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many leading items two sequences have in common."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # the usual case of a long system prompt needs no loop in Python
        return shorter
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return shorter
