//! The panes: a tab for each view.

use std::sync::Arc;

use egui::{ScrollArea, Ui, WidgetText, vec2};
use egui_tiles::{Behavior, SimplificationOptions, Tabs, TileId, Tiles, UiResponse};

use super::App;
use super::save::{Exports, What};
use crate::colour::Palette;
use crate::selection::Selection;
use crate::source::Command;
use crate::store::Store;
use crate::subject::Subject;
use crate::view::{Cx, View};

/// Room that a view is given at least, in points; a smaller pane scrolls.
const LEAST: egui::Vec2 = vec2(300.0, 200.0);

pub(super) fn ui(app: &mut App, ui: &mut Ui, is_live: bool) {
    let mut panes = Panes {
        views: &mut app.views,
        subject: &app.subject,
        store: &app.store,
        selection: &mut app.selection,
        commands: &mut app.commands,
        palette: app.palette,
        is_live,
        drawn: &mut app.drawn,
        exports: &app.save.exports,
        wanted: None,
        hidden: None,
    };
    if app.layout.tree.tiles.iter().all(|(tile, _)| !app.layout.tree.is_visible_in_layout(*tile)) {
        ui.centered_and_justified(|ui| ui.weak("No view is shown. Choose some in the menu Layout."));
        return;
    }
    app.layout.tree.ui(&mut panes, ui);
    let (wanted, hidden) = (panes.wanted, panes.hidden);
    if let Some(tile) = hidden {
        app.layout.tree.set_visible(tile, false);
    }
    if let Some(what) = wanted {
        super::save::ask(app, what);
    }
}

/// A view's name as a title.
pub(super) fn title(name: &str) -> String {
    if name.len() <= 3 {
        return name.to_uppercase(); // MTP
    }
    let mut chars = name.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

struct Panes<'a> {
    views: &'a mut Vec<Box<dyn View>>,
    subject: &'a Arc<Subject>,
    store: &'a Store,
    selection: &'a mut Selection,
    commands: &'a mut Vec<Command>,
    palette: Palette,
    is_live: bool,
    drawn: &'a mut Vec<&'static str>,
    exports: &'a Exports,
    /// What is to be written to a file.
    wanted: Option<What>,
    /// A pane that was closed.
    hidden: Option<TileId>,
}

impl Panes<'_> {
    fn about(&self, tiles: &Tiles<String>, tile: TileId) -> Option<String> {
        let name = tiles.get_pane(&tile)?;
        let (index, view) = self.views.iter().enumerate().find(|(_, view)| view.name() == name)?;
        let key = if index < 9 { format!(" (key {})", index + 1) } else { String::new() };
        Some(format!("{}{key}", view.about()))
    }
}

impl Behavior<String> for Panes<'_> {
    fn pane_ui(&mut self, ui: &mut Ui, _tile: TileId, name: &mut String) -> UiResponse {
        let Some(view) = self.views.iter_mut().find(|view| view.name() == name) else { return UiResponse::None };
        let mut cx = Cx {
            subject: self.subject,
            store: self.store,
            selection: self.selection,
            commands: self.commands,
            is_live: self.is_live,
            palette: self.palette,
        };
        egui::Frame::new().inner_margin(6).show(ui, |ui| {
            let room = ui.available_size().max(LEAST);
            ScrollArea::both().auto_shrink(false).show(ui, |ui| {
                ui.set_max_size(room);
                ui.push_id(view.name(), |ui| view.ui(ui, &mut cx));
            });
        });
        self.drawn.push(view.name());
        UiResponse::None
    }

    fn tab_title_for_pane(&mut self, name: &String) -> WidgetText {
        title(name).into()
    }

    fn is_tab_closable(&self, _tiles: &Tiles<String>, _tile: TileId) -> bool {
        true
    }

    fn on_tab_close(&mut self, _tiles: &mut Tiles<String>, tile: TileId) -> bool {
        self.hidden = Some(tile);
        false // it is hidden, not removed, so that it comes back where it was
    }

    fn on_tab_button(&mut self, tiles: &mut Tiles<String>, tile: TileId, button: egui::Response) -> egui::Response {
        match self.about(tiles, tile) {
            Some(about) => button.on_hover_text(about),
            None => button,
        }
    }

    fn top_bar_right_ui(&mut self, tiles: &Tiles<String>, ui: &mut Ui, _tile: TileId, tabs: &Tabs, _scroll: &mut f32) {
        let Some((active, name)) = tabs.active.and_then(|tile| Some((tile, tiles.get_pane(&tile)?))) else { return };
        ui.add_space(4.0);
        let menu = ui.menu_button("Save", |ui| {
            for what in self.exports.of_view(name) {
                if ui.button(what.menu()).on_hover_text(what.about()).clicked() {
                    self.wanted = Some(what);
                }
            }
        });
        super::label::label(&menu.response, &format!("save {name}"));
        let about = self.about(tiles, active).unwrap_or_default();
        let mark = egui::Button::new("?").frame(false).sense(egui::Sense::click());
        let mark = ui.add(mark).on_hover_text(&about);
        super::label::label(&mark, &format!("about {name}"));
        egui::Popup::from_toggle_button_response(&mark).show(|ui| {
            ui.set_max_width(320.0);
            ui.label(about);
        });
    }

    fn simplification_options(&self) -> SimplificationOptions {
        SimplificationOptions { all_panes_must_have_tabs: true, ..SimplificationOptions::default() }
    }

    fn gap_width(&self, _style: &egui::Style) -> f32 {
        3.0
    }
}
