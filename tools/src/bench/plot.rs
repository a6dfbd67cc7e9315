//! Pictures of figures, as SVG.

use std::path::Path;

use plotters::prelude::*;

use crate::error::{Error, Result};

/// The picture's size in pixels.
const SIZE: (u32, u32) = (640, 360);
/// Room above the highest and right of the last point, as a part.
const ROOM: f64 = 1.08;

/// Draws a line through `points`, which are in the order of `x`, from zero on both axes.
///
/// # Errors
/// If the file can't be written.
pub fn line(path: &Path, x: &str, y: &str, points: &[(f64, f64)]) -> Result<()> {
    draw(path, x, y, points).map_err(|error| Error::Bench {
        what: format!("{} could not be drawn", path.display()),
        found: error.to_string(),
    })
}

fn draw(
    path: &Path,
    x: &str,
    y: &str,
    points: &[(f64, f64)],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
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
