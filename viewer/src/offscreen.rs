//! Pictures and numbers without a window.

use std::time::{Duration, Instant};

use egui::{Context, FullOutput, Pos2, RawInput, Rect, TexturesDelta, Theme, vec2};
use egui_wgpu::{RenderState, RendererOptions, ScreenDescriptor, WgpuConfiguration, WgpuSetup, wgpu};
use image::RgbaImage;

use crate::app::App;
use crate::numbers::Table;

/// Frames that must come out without anything to wait for before the picture is taken: layouts settle in the first ones.
const CALM_FRAMES: u32 = 4;
/// How long the device may take for one picture.
const DEVICE_TIME: Duration = Duration::from_mins(1);
/// Work on the store between two frames.
const STORE_TIME: Duration = Duration::from_millis(100);

/// What a picture is to be like.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Width and height in points.
    pub size: [f32; 2],
    /// Pixels of a point: 2 for a picture twice as fine.
    pub pixels_per_point: f32,
    /// Light or dark.
    pub theme: Theme,
    /// The view to draw alone; without one, the whole window.
    pub view: Option<String>,
    /// How long to wait for the source and for views that compute.
    pub timeout: Duration,
}

impl Default for Picture {
    fn default() -> Self {
        let timeout = Duration::from_mins(2);
        Self { size: [1280.0, 800.0], pixels_per_point: 1.0, theme: Theme::Dark, view: None, timeout }
    }
}

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No device to draw with.
    #[error("no device to draw with: {0}")]
    NoDevice(String),
    /// A view that there is not.
    #[error("there is no view {name:?}; the views are {}", views.join(", "))]
    NoView {
        /// What was asked for.
        name: String,
        /// What there is.
        views: Vec<String>,
    },
    /// A size that the device cannot draw.
    #[error("{width} × {height} pixels cannot be drawn, at most {most} in each direction")]
    Size {
        /// Pixels.
        width: f32,
        /// Pixels.
        height: f32,
        /// What the device can do.
        most: u32,
    },
    /// It took too long.
    #[error("no picture after {seconds} s: {what}")]
    Timeout {
        /// How long was waited.
        seconds: u64,
        /// What for.
        what: String,
    },
    /// The device failed.
    #[error("the device did not draw: {0}")]
    Device(String),
}

/// Draws the app, or one view of it, after the source has been read completely and nothing computes any more.
pub fn picture(app: &mut App, picture: &Picture, setup: WgpuSetup) -> Result<RgbaImage, Error> {
    check_view(app, picture.view.as_deref())?;
    let mut stage = Stage::new(picture, setup)?;
    wait(app, picture.timeout, CALM_FRAMES, |app| match &picture.view {
        Some(view) => stage.frame(|ui| app.view_ui(ui, view)),
        None => stage.frame(|ui| app.ui(ui)),
    })?;
    stage.read()
}

/// The numbers of a view, after the source has been read completely.
pub fn numbers(app: &mut App, view: &str, timeout: Duration) -> Result<Vec<Table>, Error> {
    check_view(app, Some(view))?;
    wait(app, timeout, 1, |_| ())?;
    Ok(app.numbers(view).unwrap_or_default())
}

fn check_view(app: &App, view: Option<&str>) -> Result<(), Error> {
    let views = app.names();
    match view {
        Some(name) if !views.contains(&name) => {
            Err(Error::NoView { name: name.to_owned(), views: views.into_iter().map(str::to_owned).collect() })
        }
        _ => Ok(()),
    }
}

/// Draws until so many frames came out while there was nothing to wait for.
fn wait(app: &mut App, timeout: Duration, calm: u32, mut draw: impl FnMut(&mut App)) -> Result<(), Error> {
    let started = Instant::now();
    let mut frames = 0;
    while frames < calm {
        app.show_all();
        app.poll(STORE_TIME);
        draw(app);
        match app.waits_for() {
            None => frames += 1,
            Some(what) if started.elapsed() > timeout => {
                return Err(Error::Timeout { seconds: timeout.as_secs(), what });
            }
            Some(_) => {
                frames = 0;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    Ok(())
}

/// A screen that nobody sees: egui, a renderer, and the last frame.
pub struct Stage {
    ctx: Context,
    state: RenderState,
    screen: ScreenDescriptor,
    rect: Rect,
    frames: u32,
    last: Option<FullOutput>,
}

impl Stage {
    /// A screen like a picture wants it.
    pub fn new(picture: &Picture, setup: WgpuSetup) -> Result<Self, Error> {
        let instance = pollster::block_on(setup.new_instance());
        let configuration = WgpuConfiguration { wgpu_setup: setup, ..WgpuConfiguration::default() };
        let state = RenderState::create(&configuration, &instance, None, RendererOptions::PREDICTABLE);
        let state = pollster::block_on(state).map_err(|wrong| Error::NoDevice(wrong.to_string()))?;
        let most = state.device.limits().max_texture_dimension_2d;
        let [width, height] = picture.size.map(|points| (points * picture.pixels_per_point).round());
        if !(1.0..=most as f32).contains(&width) || !(1.0..=most as f32).contains(&height) {
            return Err(Error::Size { width, height, most });
        }
        let ctx = Context::default();
        ctx.set_theme(picture.theme);
        ctx.set_pixels_per_point(picture.pixels_per_point);
        ctx.all_styles_mut(|style| style.animation_time = 0.0); // nobody waits for animations
        let screen = ScreenDescriptor {
            size_in_pixels: [width as u32, height as u32],
            pixels_per_point: picture.pixels_per_point,
        };
        let rect = Rect::from_min_size(Pos2::ZERO, vec2(picture.size[0], picture.size[1]));
        Ok(Self { ctx, state, screen, rect, frames: 0, last: None })
    }

    /// Runs the interface once, without drawing it.
    pub fn frame(&mut self, mut ui: impl FnMut(&mut egui::Ui)) {
        self.frames += 1;
        let input = RawInput {
            screen_rect: Some(self.rect),
            time: Some(f64::from(self.frames) / 60.0),
            max_texture_side: Some(self.state.device.limits().max_texture_dimension_2d as usize),
            ..RawInput::default()
        };
        let mut output = self.ctx.run_ui(input, |root| ui(root));
        self.textures(std::mem::take(&mut output.textures_delta));
        self.last = Some(output);
    }

    /// The last frame as triangles.
    pub fn tessellate(&self) -> Vec<egui::ClippedPrimitive> {
        let shapes = self.last.as_ref().map(|output| output.shapes.clone()).unwrap_or_default();
        self.ctx.tessellate(shapes, self.screen.pixels_per_point)
    }

    fn textures(&self, mut delta: TexturesDelta) {
        let mut renderer = self.state.renderer.write();
        for (id, images) in delta.set.drain() {
            for image in images {
                renderer.update_texture(&self.state.device, &self.state.queue, id, &image);
            }
        }
        for id in delta.free.drain() {
            renderer.free_texture(&id);
        }
    }

    /// Draws the last frame and reads it back.
    pub fn read(&self) -> Result<RgbaImage, Error> {
        let primitives = self.tessellate();
        let (device, queue) = (&self.state.device, &self.state.queue);
        let [width, height] = self.screen.size_in_pixels;
        let size = wgpu::Extent3d { width, height, depth_or_array_layers: 1 };
        let texture = device.create_texture(&wgpu::TextureDescriptor {
            label: Some("picture"),
            size,
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: self.state.target_format,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        let row = (width * 4).next_multiple_of(wgpu::COPY_BYTES_PER_ROW_ALIGNMENT);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("picture"),
            size: u64::from(row) * u64::from(height),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut renderer = self.state.renderer.write();
        let before = renderer.update_buffers(device, queue, &mut encoder, &primitives, &self.screen);
        let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
        let mut pass = encoder
            .begin_render_pass(&wgpu::RenderPassDescriptor {
                label: Some("picture"),
                color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                    view: &view,
                    resolve_target: None,
                    ops: wgpu::Operations {
                        load: wgpu::LoadOp::Clear(wgpu::Color::BLACK),
                        store: wgpu::StoreOp::Store,
                    },
                    depth_slice: None,
                })],
                ..wgpu::RenderPassDescriptor::default()
            })
            .forget_lifetime();
        renderer.render(&mut pass, &primitives, &self.screen);
        drop(pass);
        let layout = wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(row), rows_per_image: None };
        let to = wgpu::TexelCopyBufferInfo { buffer: &buffer, layout };
        encoder.copy_texture_to_buffer(texture.as_image_copy(), to, size);
        queue.submit(before.into_iter().chain([encoder.finish()]));
        let (sender, receiver) = std::sync::mpsc::channel();
        buffer.slice(..).map_async(wgpu::MapMode::Read, move |mapped| drop(sender.send(mapped)));
        let wait = wgpu::PollType::Wait { submission_index: None, timeout: Some(DEVICE_TIME) };
        device.poll(wait).map_err(|wrong| Error::Device(wrong.to_string()))?;
        let mapped = receiver.recv().map_err(|wrong| Error::Device(wrong.to_string()))?;
        mapped.map_err(|wrong| Error::Device(wrong.to_string()))?;
        let bytes = buffer.slice(..).get_mapped_range().map_err(|wrong| Error::Device(wrong.to_string()))?;
        let mut pixels: Vec<u8> =
            bytes.chunks(row as usize).flat_map(|row| &row[..width as usize * 4]).copied().collect();
        if matches!(self.state.target_format, wgpu::TextureFormat::Bgra8Unorm | wgpu::TextureFormat::Bgra8UnormSrgb) {
            pixels.chunks_exact_mut(4).for_each(|pixel| pixel.swap(0, 2));
        }
        RgbaImage::from_raw(width, height, pixels).ok_or_else(|| Error::Device("too few pixels came back".into()))
    }
}
