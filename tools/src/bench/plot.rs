//! Pictures of figures, as SVG.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};

/// The picture's size in pixels.
const SIZE: (u32, u32) = (640, 360);
/// Room above the highest and right of the last point, as a part.
const ROOM: f64 = 1.08;
/// Room right of the longest bar, for its figure, as a part.
const FIGURES: f64 = 1.12;
/// Room left of the bars for their names, in pixels.
const NAMES: u32 = 200;
/// A bar's height with the space around it, in pixels.
const BAR: u32 = 28;
/// What a picture of bars has above and below them, in pixels.
const FRAME: u32 = 72;

/// Draws a line through `points`, which are in the order of `x`, from zero on both axes.
///
/// # Errors
/// If the file can't be written.
pub fn line(path: &Path, x: &str, y: &str, points: &[(f64, f64)]) -> Result<()> {
    draw_line(path, x, y, points).map_err(|error| trouble(path, error.as_ref()))
}

/// Draws a bar for each name and figure, the first one at the top, from zero on. `digits` of each figure's are
/// written behind the point.
///
/// # Errors
/// If the file can't be written.
pub fn bars(path: &Path, x: &str, digits: usize, bars: &[(String, f64)]) -> Result<()> {
    draw_bars(path, x, digits, bars).map_err(|error| trouble(path, error.as_ref()))
}

fn trouble(path: &Path, error: &dyn std::error::Error) -> Error {
    Error::Bench {
        what: format!("{} could not be drawn", path.display()),
        found: error.to_string(),
    }
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw_bars(path: &Path, x: &str, digits: usize, bars: &[(String, f64)]) -> Drawn {
    let count = i32::try_from(bars.len())?;
    let most = bars.iter().map(|bar| bar.1).fold(0.0, f64::max).max(1e-3);
    let height = FRAME + BAR * bars.len() as u32;
    let area = SVGBackend::new(path, (SIZE.0, height)).into_drawing_area();
    area.fill(&WHITE)?;
    // Bar n lies between n and n + 1 below the axis's upper end.
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(0.0..most * FIGURES, f64::from(count)..0.0)?;
    chart.configure_mesh().x_desc(x).disable_y_mesh().disable_y_axis().max_light_lines(0).draw()?;
    for (at, (name, figure)) in bars.iter().enumerate() {
        let middle = at as f64 + 0.5;
        let corners = [(0.0, middle - 0.35), (*figure, middle + 0.35)];
        chart.draw_series([Rectangle::new(corners, BLUE.mix(0.6).filled())])?;
        let font = ("sans-serif", 14).into_font().color(&BLACK);
        let (left, right) =
            (Pos::new(HPos::Left, VPos::Center), Pos::new(HPos::Right, VPos::Center));
        let texts =
            [(0.0, -6, name.clone(), right), (*figure, 6, format!("{figure:.digits$}"), left)];
        chart.draw_series(texts.map(|(x, by, text, side)| {
            EmptyElement::at((x, middle)) + Text::new(text, (by, 0), font.clone().pos(side))
        }))?;
    }
    area.present()?;
    Ok(())
}

fn draw_line(path: &Path, x: &str, y: &str, points: &[(f64, f64)]) -> Drawn {
    let most = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(0.0, f64::max).max(1e-3);
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most(|p| p.0) * ROOM, 0.0..most(|p| p.1) * ROOM)?;
    chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw()?;
    chart.draw_series(LineSeries::new(points.iter().copied(), BLUE.stroke_width(2)))?;
    chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, BLUE.filled())))?;
    area.present()?;
    Ok(())
}
