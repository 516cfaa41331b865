//! Principal components of many rows: moments that grow row by row, and the directions of largest variance.

/// Rows that were added up: enough to know their mean and covariance.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    count: u64,
    /// The first row. Sums are of differences to it, so that a large mean does not drown a small variance.
    shift: Vec<f64>,
    sum: Vec<f64>,
    /// `[dim, dim]`, on and above the diagonal.
    products: Vec<f64>,
    difference: Vec<f64>,
}

impl Moments {
    /// No rows yet, of `dim` numbers each.
    pub fn new(dim: usize) -> Self {
        Self {
            count: 0,
            shift: Vec::new(),
            sum: vec![0.0; dim],
            products: vec![0.0; dim * dim],
            difference: vec![0.0; dim],
        }
    }

    /// Numbers of a row.
    pub fn dim(&self) -> usize {
        self.sum.len()
    }

    /// Rows that were added.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Adds a row. A row of another length, or one with a number that is not finite, is left out: returns false.
    pub fn push(&mut self, row: &[f32]) -> bool {
        let dim = self.dim();
        if row.len() != dim || row.iter().any(|number| !number.is_finite()) {
            return false;
        }
        if self.count == 0 {
            self.shift = row.iter().map(|&number| f64::from(number)).collect();
        }
        self.count += 1;
        for ((difference, &number), shift) in self.difference.iter_mut().zip(row).zip(&self.shift) {
            *difference = f64::from(number) - shift;
        }
        for i in 0..dim {
            let one = self.difference[i];
            self.sum[i] += one;
            for (product, other) in self.products[i * dim + i..(i + 1) * dim].iter_mut().zip(&self.difference[i..]) {
                *product += one * other;
            }
        }
        true
    }

    /// The mean row.
    pub fn mean(&self) -> Vec<f64> {
        let count = (self.count as f64).max(1.0);
        self.shift.iter().zip(&self.sum).map(|(shift, sum)| shift + sum / count).collect()
    }

    /// The covariance `[dim, dim]`, dividing by the number of rows.
    pub fn covariance(&self) -> Vec<f64> {
        let (dim, count) = (self.dim(), (self.count as f64).max(1.0));
        let mut covariance = vec![0.0; dim * dim];
        for i in 0..dim {
            for j in i..dim {
                let value = self.products[i * dim + j] / count - self.sum[i] / count * (self.sum[j] / count);
                covariance[i * dim + j] = value;
                covariance[j * dim + i] = value;
            }
        }
        covariance
    }
}

/// Directions of largest variance.
#[derive(Clone, Debug, PartialEq)]
pub struct Components {
    /// The mean of all rows.
    pub mean: Vec<f64>,
    /// Directions of length 1, at right angles to each other, the one with the largest variance first. The largest number
    /// of each (by size) is positive.
    pub axes: Vec<Vec<f64>>,
    /// Variance along each.
    pub variances: Vec<f64>,
    /// Variance along all directions that there are.
    pub total_variance: f64,
}

impl Components {
    /// The share of all variance that each direction explains; 0 if all rows are the same.
    pub fn explained(&self) -> Vec<f64> {
        let share = |variance: &f64| if self.total_variance > 0.0 { variance / self.total_variance } else { 0.0 };
        self.variances.iter().map(share).collect()
    }

    /// Where a row stands along a direction, measured from the mean.
    pub fn project(&self, row: &[f32], axis: usize) -> f64 {
        row.iter().zip(&self.mean).zip(&self.axes[axis]).map(|((&n, mean), axis)| (f64::from(n) - mean) * axis).sum()
    }
}

/// Directions beyond those wanted that are iterated too: they make the wanted ones settle sooner.
const SPARE: usize = 6;
/// Iterations at most. If two variances are nearly the same behind so many, their directions are not settled, but the
/// plane that they span has nearly the most variance.
const MAX_ITERATIONS: usize = 300;
/// Settled when `|C v − λ v|` is below this share of the largest variance.
const TOLERANCE: f64 = 1e-10;

/// The `wanted` directions of largest variance (fewer if rows are shorter), by subspace iteration from fixed beginnings:
/// the same rows give the same directions. `None` without rows.
pub fn components(moments: &Moments, wanted: usize) -> Option<Components> {
    let dim = moments.dim();
    if moments.count == 0 || dim == 0 {
        return None;
    }
    let wanted = wanted.min(dim);
    let covariance = moments.covariance();
    let total_variance = (0..dim).map(|i| covariance[i * dim + i].max(0.0)).sum();
    let width = (wanted + SPARE).min(dim);
    let mut basis: Vec<Vec<f64>> = (0..width).map(|i| scattered(dim, i)).collect();
    orthonormalise(&mut basis);
    let mut values = vec![0.0; width];
    for _ in 0..MAX_ITERATIONS {
        let images: Vec<Vec<f64>> = basis.iter().map(|vector| times(&covariance, vector)).collect();
        let inner = (0..width * width).map(|at| dot(&basis[at / width], &images[at % width])).collect();
        let (found, turns) = eigen(inner, width);
        let turned = |vectors: &[Vec<f64>]| -> Vec<Vec<f64>> { turns.iter().map(|turn| mix(vectors, turn)).collect() };
        let (ritz, mut next) = (turned(&basis), turned(&images));
        values = found;
        let distance = |i: usize| {
            next[i].iter().zip(&ritz[i]).map(|(image, vector)| (image - values[i] * vector).powi(2)).sum::<f64>().sqrt()
        };
        if (0..wanted).all(|i| distance(i) <= TOLERANCE * values[0].abs()) {
            basis = ritz;
            break;
        }
        orthonormalise(&mut next);
        basis = next;
    }
    basis.truncate(wanted);
    for axis in &mut basis {
        fix_sign(axis);
    }
    let variances = values[..wanted].iter().map(|value| value.max(0.0)).collect();
    Some(Components { mean: moments.mean(), axes: basis, variances, total_variance })
}

/// Eigenvalues (largest first) and eigenvectors of a small symmetric matrix `[size, size]`, by Jacobi rotations.
pub fn eigen(mut matrix: Vec<f64>, size: usize) -> (Vec<f64>, Vec<Vec<f64>>) {
    let mut vectors: Vec<Vec<f64>> = (0..size).map(|i| (0..size).map(|j| f64::from(i == j)).collect()).collect();
    let scale: f64 = matrix.iter().map(|cell| cell * cell).sum();
    for _ in 0..64 {
        let pairs = || (0..size).flat_map(|p| (p + 1..size).map(move |q| (p, q)));
        if pairs().map(|(p, q)| matrix[p * size + q].powi(2)).sum::<f64>() <= 1e-32 * scale {
            break;
        }
        for (p, q) in pairs() {
            rotate(&mut matrix, &mut vectors, size, (p, q));
        }
    }
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|&a, &b| matrix[b * size + b].total_cmp(&matrix[a * size + a]));
    let values = order.iter().map(|&i| matrix[i * size + i]).collect();
    (values, order.iter().map(|&i| vectors[i].clone()).collect())
}

/// The rotation of rows and columns p and q that makes the cell (p, q) zero.
fn rotate(matrix: &mut [f64], vectors: &mut [Vec<f64>], size: usize, (p, q): (usize, usize)) {
    let off = matrix[p * size + q];
    if off == 0.0 {
        return;
    }
    let theta = (matrix[q * size + q] - matrix[p * size + p]) / (2.0 * off);
    let tangent = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let cosine = 1.0 / tangent.hypot(1.0);
    let sine = tangent * cosine;
    let turn = |a: f64, b: f64| (cosine * a - sine * b, sine * a + cosine * b);
    for k in 0..size {
        (matrix[k * size + p], matrix[k * size + q]) = turn(matrix[k * size + p], matrix[k * size + q]);
    }
    for k in 0..size {
        (matrix[p * size + k], matrix[q * size + k]) = turn(matrix[p * size + k], matrix[q * size + k]);
        (vectors[p][k], vectors[q][k]) = turn(vectors[p][k], vectors[q][k]);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn times(matrix: &[f64], vector: &[f64]) -> Vec<f64> {
    matrix.chunks(vector.len()).map(|row| dot(row, vector)).collect()
}

/// The sum of vectors, each times its factor.
fn mix(vectors: &[Vec<f64>], factors: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; vectors[0].len()];
    for (vector, factor) in vectors.iter().zip(factors) {
        sum.iter_mut().zip(vector).for_each(|(sum, number)| *sum += factor * number);
    }
    sum
}

/// Gram and Schmidt's, twice for the rounding. A vector that depends on those before it becomes another one.
fn orthonormalise(vectors: &mut [Vec<f64>]) {
    for i in 0..vectors.len() {
        let (before, rest) = vectors.split_at_mut(i);
        let vector = &mut rest[0];
        let mut replacement = i;
        loop {
            let length = dot(vector, vector).sqrt();
            for _ in 0..2 {
                for other in &*before {
                    let along = dot(vector, other);
                    vector.iter_mut().zip(other).for_each(|(number, other)| *number -= along * other);
                }
            }
            let left = dot(vector, vector).sqrt();
            if left > 1e-12 * length && left > 0.0 {
                for number in vector.iter_mut() {
                    *number /= left;
                }
                break;
            }
            replacement += vector.len();
            *vector = scattered(vector.len(), replacement);
        }
    }
}

/// A vector that looks random and is always the same for the same seed.
fn scattered(dim: usize, seed: usize) -> Vec<f64> {
    let number = |i: usize| {
        let mut hash = ((seed * dim + i) as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (hash >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    };
    (0..dim).map(number).collect()
}

fn fix_sign(axis: &mut [f64]) {
    let largest = axis.iter().copied().fold(0.0f64, |largest, n| if n.abs() > largest.abs() { n } else { largest });
    if largest < 0.0 {
        for number in axis {
            *number = -*number;
        }
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "the numbers are chosen so that results are exact")]
mod tests {
    use super::*;

    /// Rows with different variances along skewed directions, far from 0.
    fn rows(count: usize, dim: usize) -> Vec<Vec<f32>> {
        let noise = scattered(count * dim, 7);
        (0..count)
            .map(|row| {
                let own = &noise[row * dim..][..dim];
                (0..dim).map(|i| (100.0 + 3.0 * own[0] * (i as f64).cos() + own[i] / (i + 1) as f64) as f32).collect()
            })
            .collect()
    }

    fn moments(rows: &[Vec<f32>]) -> Moments {
        let mut moments = Moments::new(rows[0].len());
        assert!(rows.iter().all(|row| moments.push(row)));
        moments
    }

    /// Mean and covariance in two passes.
    fn batch(rows: &[Vec<f32>]) -> (Vec<f64>, Vec<f64>) {
        let (count, dim) = (rows.len() as f64, rows[0].len());
        let mean: Vec<f64> = (0..dim).map(|i| rows.iter().map(|row| f64::from(row[i])).sum::<f64>() / count).collect();
        let cell = |at: usize| {
            let (i, j) = (at / dim, at % dim);
            let product = |row: &Vec<f32>| (f64::from(row[i]) - mean[i]) * (f64::from(row[j]) - mean[j]);
            rows.iter().map(product).sum::<f64>() / count
        };
        let covariance = (0..dim * dim).map(cell).collect();
        (mean, covariance)
    }

    #[test]
    fn moments_that_grow_are_those_of_all_rows() {
        let rows = rows(57, 9);
        let moments = moments(&rows);
        let (mean, covariance) = batch(&rows);
        assert_eq!(moments.count(), 57);
        assert!(moments.mean().iter().zip(mean).all(|(a, b)| (a - b).abs() < 1e-9));
        assert!(moments.covariance().iter().zip(covariance).all(|(a, b)| (a - b).abs() < 1e-9));
    }

    #[test]
    fn rows_that_are_no_numbers_are_left_out() {
        let mut moments = Moments::new(2);
        assert!(moments.push(&[1.0, 2.0]));
        assert!(!moments.push(&[f32::NAN, 2.0]) && !moments.push(&[f32::INFINITY, 0.0]) && !moments.push(&[1.0]));
        assert_eq!((moments.count(), moments.mean()), (1, vec![1.0, 2.0]));
        assert!(components(&Moments::new(2), 2).is_none());
    }

    #[test]
    fn components_are_those_of_the_exact_decomposition() {
        for (count, dim) in [(200, 3), (80, 12), (30, 20), (5, 16)] {
            let rows = rows(count, dim);
            let (mean, covariance) = batch(&rows);
            let (values, vectors) = eigen(covariance.clone(), dim);
            let found = components(&moments(&rows), 2).unwrap();
            assert!(found.mean.iter().zip(mean).all(|(a, b)| (a - b).abs() < 1e-9));
            for i in 0..2 {
                assert!((found.variances[i] - values[i]).abs() < 1e-9 * values[0], "{count} × {dim}");
                let cosine = dot(&found.axes[i], &vectors[i]).abs();
                assert!((cosine - 1.0).abs() < 1e-6, "{count} × {dim}, axis {i}: {cosine}");
                let largest = found.axes[i].iter().copied().fold(0.0f64, |a, b| if b.abs() > a.abs() { b } else { a });
                assert!(largest > 0.0);
            }
            let trace: f64 = (0..dim).map(|i| covariance[i * dim + i]).sum();
            assert!((found.total_variance - trace).abs() < 1e-9 && found.explained().iter().sum::<f64>() <= 1.0 + 1e-9);
        }
    }

    #[test]
    fn the_plane_is_right_even_if_its_directions_are_not_unique() {
        // The same variance along two directions, less along the third.
        let rows: Vec<Vec<f32>> =
            [[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]
                .map(Vec::from)
                .to_vec();
        let found = components(&moments(&rows), 2).unwrap();
        assert!(found.axes.iter().all(|axis| axis[2].abs() < 1e-6));
        assert!((found.explained().iter().sum::<f64>() - 8.0 / 9.0).abs() < 1e-9);
        assert!(dot(&found.axes[0], &found.axes[1]).abs() < 1e-12);
    }

    #[test]
    fn rows_that_are_all_the_same_have_no_variance() {
        let found = components(&moments(&vec![vec![3.0; 5]; 4]), 2).unwrap();
        assert_eq!(found.explained(), [0.0, 0.0]);
        assert_eq!(found.project(&[3.0; 5], 0), 0.0);
        let single = components(&moments(&[vec![1.0], vec![2.0]]), 2).unwrap();
        assert_eq!((single.axes, single.variances), (vec![vec![1.0]], vec![0.25]));
    }

    #[test]
    fn jacobi_takes_a_matrix_apart() {
        let size = 7;
        let noise = scattered(size * size, 3);
        let matrix: Vec<f64> = (0..size * size).map(|at| noise[at] + noise[at % size * size + at / size]).collect();
        let (values, vectors) = eigen(matrix.clone(), size);
        assert!(values.is_sorted_by(|a, b| a >= b));
        for at in 0..size * size {
            let sum: f64 = (0..size).map(|k| values[k] * vectors[k][at / size] * vectors[k][at % size]).sum();
            assert!((sum - matrix[at]).abs() < 1e-12);
            let expected = f64::from(at / size == at % size);
            assert!((dot(&vectors[at / size], &vectors[at % size]) - expected).abs() < 1e-12);
        }
    }
}
