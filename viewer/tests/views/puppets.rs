//! Views that show little, and a source that does what a test tells it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use moewe_viewer::heat::{Grid, HeatMap, Scale, Spec};
use moewe_viewer::numbers::Table;
use moewe_viewer::source::{Command, Event, Replay, Source, Status};
use moewe_viewer::synthetic::Shape;
use moewe_viewer::view::{Cx, View};

/// Says what is selected, and shows weights of experts by token.
pub struct Plain {
    pub name: &'static str,
    pub map: HeatMap,
}

impl Plain {
    fn grid(cx: &Cx<'_>) -> Option<Grid> {
        let (sequence, experts) = (cx.sequence()?, cx.subject.model.experts as usize);
        let mut cells = vec![0.0; sequence.tokens.len() * experts];
        for at in 0..sequence.tokens.len() {
            let Some((ids, weights)) = sequence.routing(cx.selection.layer, at) else { continue };
            for (id, weight) in ids.iter().zip(weights) {
                cells[at * experts + *id as usize] = *weight;
            }
        }
        Some(Grid::from_zero(sequence.tokens.len(), experts, cells))
    }
}

impl View for Plain {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        "Shows weights of experts, token by token."
    }

    fn ui(&mut self, ui: &mut egui::Ui, cx: &mut Cx<'_>) {
        let Some(grid) = Self::grid(cx) else {
            ui.weak("no text yet");
            return;
        };
        ui.label(format!("{} shows {:?}", self.name, cx.selection));
        let spec = Spec {
            name: self.name,
            row_axis: "token",
            column_axis: "expert",
            unit: "weight",
            scale: Scale::Sequential(cx.palette),
            row: cx.selection.token.map(|token| token as usize),
            column: cx.selection.expert.map(|expert| expert as usize),
            column_groups: 8,
            tooltip: &|row, column| format!("token {row}, expert {column}"),
            height: ui.available_height() - 60.0,
        };
        if let Some((row, column)) = self.map.show(ui, &grid, &spec).chosen {
            cx.selection.token = Some(row as u32);
            cx.selection.expert = Some(column as u32);
        }
    }

    fn numbers(&self, cx: &Cx<'_>) -> Vec<Table> {
        let grid = Self::grid(cx).expect("a text");
        vec![Table::floats("weights", &[("token", grid.rows), ("expert", grid.columns)], grid.cells.to_vec())]
    }
}

/// A view that computes for ever.
pub struct Busy;

impl View for Busy {
    fn name(&self) -> &'static str {
        "busy"
    }
    fn about(&self) -> &'static str {
        "Computes for ever."
    }
    fn ui(&mut self, _ui: &mut egui::Ui, _cx: &mut Cx<'_>) {}
    fn numbers(&self, _cx: &Cx<'_>) -> Vec<Table> {
        Vec::new()
    }
    fn is_busy(&self) -> bool {
        true
    }
}

/// A live source or a recording that does what a test tells it, and notes what it was told.
#[derive(Default)]
pub struct Told {
    pub events: VecDeque<Event>,
    pub status: Status,
    pub commands: Vec<Command>,
    pub is_recording: bool,
    pub shown: u64,
    pub speed: f64,
}

#[derive(Clone, Default)]
pub struct Puppet(pub Rc<RefCell<Told>>);

impl Source for Puppet {
    fn poll(&mut self) -> Vec<Event> {
        self.0.borrow_mut().events.drain(..).collect()
    }
    fn send(&mut self, command: Command) {
        self.0.borrow_mut().commands.push(command);
    }
    fn status(&self) -> Status {
        self.0.borrow().status.clone()
    }
    fn set_wake(&mut self, _wake: Box<dyn Fn() + Send + Sync>) {}
    fn replay(&mut self) -> Option<&mut dyn Replay> {
        let is_recording = self.0.borrow().is_recording;
        is_recording.then_some(self as &mut dyn Replay)
    }
}

impl Replay for Puppet {
    fn len(&self) -> u64 {
        96
    }
    fn position(&self) -> u64 {
        self.0.borrow().shown
    }
    fn seek(&mut self, position: u64) {
        let mut told = self.0.borrow_mut();
        let all: Vec<Event> = Shape::small().events().collect();
        let token = |event: &Event| matches!(event, Event::Token { .. });
        if position < told.shown {
            told.events = [Event::Reset].into();
            told.shown = 0;
        }
        let from = told.shown;
        let tokens = all.iter().filter(|event| token(event)).skip(from as usize).take((position - from) as usize);
        if from == 0 {
            told.events.push_back(all[0].clone());
        }
        told.events.extend(tokens.cloned());
        told.shown = position;
    }
    fn set_speed(&mut self, tokens_per_second: f64) {
        self.0.borrow_mut().speed = tokens_per_second;
    }
    fn speed(&self) -> f64 {
        self.0.borrow().speed
    }
}
