"""How the page looks: a quiet neutral base and one accent, the colour that means "yours" in the panel."""

from gradio.themes import Base, Color
from gradio.themes.utils import colors, sizes

_ACCENT = Color(
    c50="#eef6fb",
    c100="#d6eaf6",
    c200="#aed5ed",
    c300="#7dbce1",
    c400="#56b4e9",
    c500="#1f86c4",
    c600="#0072b2",
    c700="#005e93",
    c800="#004c77",
    c900="#003d60",
    c950="#002740",
    name="chatpage",
)
_TEXT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "Arial", "sans-serif"]
_CODE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]


def theme() -> Base:
    """Fonts of the reader's own system: nothing is fetched from anywhere else."""
    base = Base(
        primary_hue=_ACCENT,
        secondary_hue=_ACCENT,
        neutral_hue=colors.zinc,
        radius_size=sizes.radius_md,
        text_size=sizes.text_md,
        font=_TEXT,
        font_mono=_CODE,
    )
    return base.set(
        body_background_fill="#fafafa",
        body_background_fill_dark="#111113",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#18181b",
        background_fill_secondary="#f4f4f5",
        background_fill_secondary_dark="#1f1f23",
        block_background_fill="*background_fill_primary",
        block_background_fill_dark="*background_fill_primary",
        block_border_color="*border_color_primary",
        color_accent_soft="#e8f2f9",
        color_accent_soft_dark="#1d3140",
        border_color_primary="#e4e4e7",
        border_color_primary_dark="#2b2b30",
        block_shadow="none",
        block_radius="10px",
        block_label_background_fill="transparent",
        block_title_text_weight="500",
        input_background_fill="*background_fill_primary",
        input_background_fill_dark="*background_fill_primary",
        input_border_color="*border_color_primary",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_border_width="1px",
        input_radius="10px",
        button_large_radius="8px",
        button_small_radius="8px",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*background_fill_secondary",
        button_secondary_background_fill_hover_dark="*background_fill_secondary",
        button_secondary_border_color="*border_color_primary",
        button_secondary_border_color_dark="*border_color_primary",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="#ffffff",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_400",
    )
