//! The keyboard, wherever no text is being typed.

use egui::{Context, Event, Id, Key, Modifiers};

use super::App;

/// What the keys do, for the help window.
pub(super) const KEYS: &[(&str, &str)] = &[
    ("Left, Right", "token before, token behind"),
    ("Up, Down", "layer above (nearer to the input), layer below"),
    ("[  ]", "expert before, expert behind"),
    (",  .", "attention head before, attention head behind"),
    ("Esc", "no token and no expert: views show the whole text"),
    ("Ctrl+F  or  /", "search; Enter goes to the next match, Shift+Enter to the one before"),
    ("1 … 9", "go to a view"),
    ("Space", "play and pause a recording"),
    ("Ctrl+Enter", "in the prompt: run it"),
    ("Tab", "go through buttons, tabs and maps; arrows then move in a map"),
    ("Ctrl + scroll, drag", "zoom and move a map; a double click shows all of it"),
    ("Ctrl +  Ctrl −  Ctrl 0", "larger, smaller, as before"),
    ("?", "this window"),
];

/// What had the keyboard when the frame before ended. The key that takes focus away is not to do anything else.
#[derive(Default)]
pub(super) struct Focus {
    widget: Option<Id>,
    is_text: bool,
    is_popup: bool,
}

impl Focus {
    fn of(ctx: &Context) -> Self {
        Self {
            widget: ctx.memory(egui::Memory::focused),
            is_text: ctx.text_edit_focused(),
            is_popup: egui::Popup::is_any_open(ctx),
        }
    }
}

/// Does what the keys of this frame say. Widgets that have focus took theirs before.
pub(super) fn act(app: &mut App, ctx: &Context) {
    let now = Focus::of(ctx);
    let before = std::mem::replace(&mut app.focus, now);
    let is_typing = before.is_text || app.focus.is_text;
    let is_free = before.widget.is_none() && app.focus.widget.is_none() && !before.is_popup && !app.focus.is_popup;
    let events = ctx.input(|input| input.events.clone());
    for event in events {
        let Event::Key { key, pressed: true, modifiers, .. } = event else { continue };
        if key == Key::F && modifiers.command {
            app.bar.wants_search = true;
        } else if !is_typing && !modifiers.command && !modifiers.alt {
            press(app, key, modifiers, is_free);
        }
    }
    if app.bar.wants_search || app.help.is_open {
        ctx.request_repaint();
    }
}

fn press(app: &mut App, key: Key, modifiers: Modifiers, is_free: bool) {
    let tokens = app.store.sequence(app.selection.sequence).map_or(0, |sequence| sequence.tokens.len() as u32);
    let experts = app.subject.model.experts;
    let layers = app.subject.model.layers;
    let heads = app.subject.model.num_attention_heads;
    let selection = &mut app.selection;
    match key {
        Key::ArrowLeft if is_free => selection.token = step(selection.token, -1, tokens),
        Key::ArrowRight if is_free => selection.token = step(selection.token, 1, tokens),
        Key::ArrowUp if is_free => selection.layer = step(Some(selection.layer), -1, layers).unwrap_or(0),
        Key::ArrowDown if is_free => selection.layer = step(Some(selection.layer), 1, layers).unwrap_or(0),
        Key::OpenBracket => selection.expert = step(selection.expert, -1, experts),
        Key::CloseBracket => selection.expert = step(selection.expert, 1, experts),
        Key::Comma => selection.head = step(Some(selection.head), -1, heads).unwrap_or(0),
        Key::Period => selection.head = step(Some(selection.head), 1, heads).unwrap_or(0),
        Key::Escape if app.help.is_open => app.help.is_open = false,
        Key::Escape if is_free => (selection.token, selection.expert, app.later) = (None, None, None),
        Key::Slash if modifiers.shift => app.help.is_open = true, // `?` on keyboards whose system says so
        Key::Slash => app.bar.wants_search = true,
        Key::Questionmark => app.help.is_open = !app.help.is_open,
        Key::Space if is_free => super::drive::toggle(app),
        _ => {
            const DIGITS: [Key; 9] =
                [Key::Num1, Key::Num2, Key::Num3, Key::Num4, Key::Num5, Key::Num6, Key::Num7, Key::Num8, Key::Num9];
            let view = DIGITS.iter().position(|digit| *digit == key && !modifiers.shift);
            if let Some(view) = view.and_then(|index| app.views.get(index)) {
                app.layout.focus(view.name());
            }
        }
    }
}

/// The number before or behind one of `count`; from none, the first or the last.
pub(super) fn step(at: Option<u32>, by: i32, count: u32) -> Option<u32> {
    let last = count.checked_sub(1)?;
    Some(match at {
        None if by > 0 => 0,
        None => last,
        Some(at) => at.saturating_add_signed(by).min(last),
    })
}
