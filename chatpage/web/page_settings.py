"""The page's settings: which system prompt a chat has, and how its answers are found."""

from typing import Any, NamedTuple

import gradio as gr

from chatpage.engine import Engine
from chatpage.errors import RequestError
from chatpage.schedule.beam import Beams
from chatpage.schedule.params import SamplingParams, require_number, require_whole

CUSTOM = "Custom text"
DRAW, SEARCH = "draw", "search"
MAX_REPLIES = 4
MAX_WIDTH = 8
MAX_PENALTY = 5

EARLY_STOPPING = [
    ("As soon as so many have finished", True),
    ("When the best live one is no better than those", False),
    ("When no live one could become better", "never"),
]


class Wish(NamedTuple):
    """How the next answer is to be found: one or several are drawn, or the likeliest is searched for."""

    params: SamplingParams
    replies: int = 1
    beams: Beams | None = None


class PageSettings:
    """The settings' components, and what their values mean."""

    def __init__(self) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self._lay_out_prompt()
            self.mode = gr.Radio(
                [("Draw", DRAW), ("Beam search", SEARCH)],
                label="Answers",
                info="Drawn token by token, by chance. Or searched for: the likeliest as a whole.",
                elem_id="mode",
            )
            with gr.Column(elem_classes="mode") as self._drawing:
                self._lay_out_drawing()
            with gr.Column(elem_classes="mode", visible=False) as self._searching:
                self._lay_out_searching()
            self.max_tokens = gr.Textbox(label="Max tokens", info="Empty: the server's limit.", lines=1)
            self.reset = gr.Button("Reset", size="sm", elem_id="reset")
        self._defaults = {
            self.mode: DRAW,
            self.replies: 1,
            self.temperature: 0.7,
            self.top_p: 0.95,
            self.top_k: 0,
            self.seed: "",
            self.width: 4,
            self.length_penalty: 1,
            self.early_stopping: False,
            self.max_tokens: "",
        }
        for component, value in self._defaults.items():
            component.value = value

    def _lay_out_prompt(self) -> None:
        self.preset = gr.Dropdown(label="System prompt", info="A change begins with the next new chat.")
        self.prompt_text = gr.Textbox(
            label="Text of the system prompt",
            lines=3,
            max_lines=8,
            interactive=False,
            placeholder="Empty: the server's default.",
        )

    def _lay_out_drawing(self) -> None:
        self.replies = gr.Radio(
            [("1 reply" if count == 1 else f"{count} replies", count) for count in range(1, MAX_REPLIES + 1)],
            label="Replies",
            info="Several are written side by side, and you choose one.",
            elem_id="replies",
        )
        with gr.Row():
            self.temperature = gr.Slider(0, 2, step=0.05, label="Temperature", info="0 takes the likeliest token.")
            self.top_p = gr.Slider(0.05, 1, step=0.05, label="Top-p", info="1 keeps all.")
        with gr.Row():
            self.top_k = gr.Slider(0, 200, step=1, label="Top-k", info="0 keeps all.")
            self.seed = gr.Textbox(label="Seed", info="Empty: a new draw each time.", lines=1)

    def _lay_out_searching(self) -> None:
        # No bounds for Gradio to check: it would not say which field is wrong.
        with gr.Row():
            self.width = gr.Number(label="Beam width", info=f"2 to {MAX_WIDTH} beams live at once.")
            self.length_penalty = gr.Number(label="Length penalty", info="Above 0 favours long answers.", step=0.1)
        self.early_stopping = gr.Dropdown(
            EARLY_STOPPING,
            label="Early stopping",
            info="When the search ends, once as many beams have finished as live at once.",
        )

    def wire(self, **how: Any) -> None:
        groups = [self._drawing, self._searching]
        self.mode.input(self._only, self.mode, groups, queue=False, **how)
        self.reset.click(self._as_at_first, None, [*self._defaults, *groups], queue=False, **how)

    @staticmethod
    def _only(mode: str) -> list[Any]:
        """The settings of a mode: what does not count is not there."""
        return [gr.Column(visible=mode == DRAW), gr.Column(visible=mode == SEARCH)]

    def _as_at_first(self) -> list[Any]:
        return [*self._defaults.values(), *self._only(DRAW)]

    # -- what was chosen ------------------------------------------------------------------------------------------

    @property
    def fields(self) -> set[Any]:
        return {self.preset, self.prompt_text, *self._defaults}

    def system_prompt(self, values: dict[Any, Any], engine: Engine) -> str | None:
        """The chosen system prompt; None is the server's default."""
        if values[self.preset] == CUSTOM:
            return values[self.prompt_text] or None
        return next((s.text for s in engine.systems[1:] if s.name == values[self.preset]), None)

    def wish(self, values: dict[Any, Any]) -> Wish:
        """How answers are to be found.

        Raises:
            RequestError: which value is wrong, and what is allowed.
        """
        max_tokens = _whole("max_tokens", values[self.max_tokens])
        if values[self.mode] == SEARCH:
            return Wish(SamplingParams(temperature=0, max_tokens=max_tokens), beams=self._beams(values))
        replies, temperature = values[self.replies], values[self.temperature]
        require_whole("Replies", replies, 1, MAX_REPLIES, param="replies")
        params = SamplingParams(
            temperature=temperature,
            top_p=values[self.top_p],
            top_k=int(values[self.top_k]),
            max_tokens=max_tokens,
            seed=_whole("seed", values[self.seed]),
        )
        if replies > 1 and params.greedy:
            raise RequestError(
                f"Replies is {replies}, and Temperature is 0: all of them would be the same. Replies must be 1 then.",
                param="replies",
            )
        return Wish(params, replies)

    def _beams(self, values: dict[Any, Any]) -> Beams:
        width, length_penalty = _number(values[self.width]), _number(values[self.length_penalty])
        require_whole("Beam width", width, 2, MAX_WIDTH, param="width")
        require_number("Length penalty", length_penalty, -MAX_PENALTY, MAX_PENALTY, param="length_penalty")
        return Beams(width, float(length_penalty), values[self.early_stopping])


def presets(engine: Engine) -> list[tuple[str, str]]:
    """Label and value of each system prompt that may be chosen."""
    private = engine.sharing == "off"
    shared = [(system.name if private else f"{system.name}, shared", system.name) for system in engine.systems]
    own = CUSTOM if engine.sharing == "all" else f"{CUSTOM}, private to this chat"
    return [*shared, (own, CUSTOM)]


def _number(value: Any) -> Any:
    """What a number's field says, which may be nothing."""
    return "" if value is None else value


def _whole(name: str, text: str | None) -> int | None:
    """The number in a field that may be empty."""
    if not text or not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"{name} is {text!r}; it must be a whole number.", param=name) from None
