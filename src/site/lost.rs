//! Detects a site whose catalogue is missing although the rest of its state exists. The site starts
//! with an empty catalogue, and `doctor` reports this until the operator removes the file
//! `catalogue.lost`.

use std::path::{Path, PathBuf};

use base::clock;
use base::durable;
use base::fault::Fault;

/// State that each site has in addition to its catalogue after its first start.
const BESIDE: [&str; 3] = ["places.redb", "store/index.redb", "published"];

const NEXT: &str = "transfers that are open at the hub continue; for artifacts that had arrived here, run 'packhorse deliver' again at the hub: intact \
                    content that is still in place is used and not sent again; publish again the artifacts that were published at this site, or restore the \
                    complete data_dir from a backup";

fn file(data_dir: &Path) -> PathBuf {
    data_dir.join("catalogue.lost")
}

/// Creates `catalogue.lost` if the catalogue is missing. Must run before the catalogue is opened.
pub(super) fn note(data_dir: &Path) -> Result<(), Fault> {
    let catalogue = data_dir.join("catalogue.db");
    if catalogue.exists() || !BESIDE.iter().any(|part| data_dir.join(part).exists()) {
        return Ok(());
    }
    durable::replace(&file(data_dir), clock::now_rfc3339().as_bytes())?;
    tracing::error!(file = %catalogue.display(), next = NEXT, "the catalogue is missing: the site starts with an empty one");
    Ok(())
}

/// The line of `doctor` about a lost catalogue.
pub(super) fn report(data_dir: &Path) -> Option<String> {
    let file = file(data_dir);
    let since = std::fs::read_to_string(&file).ok()?;
    let (at, path) = (
        base::text::Text::<64>::from(since.trim()),
        data_dir.join("catalogue.db"),
    );
    Some(format!(
        "fault catalogue: {} was missing on {at}, and the site started with an empty one; {NEXT}; then remove {}",
        path.display(),
        file.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_catalogue_is_reported_until_the_note_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        note(data).unwrap();
        assert_eq!(report(data), None, "a new site reports no loss");
        durable::create_dir_all(&data.join("store")).unwrap();
        durable::replace(&data.join("store/index.redb"), b"").unwrap();
        durable::replace(&data.join("catalogue.db"), b"").unwrap();
        note(data).unwrap();
        assert_eq!(report(data), None);
        std::fs::remove_file(data.join("catalogue.db")).unwrap();
        note(data).unwrap();
        durable::replace(&data.join("catalogue.db"), b"").unwrap();
        note(data).unwrap();
        let told = report(data).unwrap();
        assert!(
            told.starts_with("fault catalogue: ") && told.contains("packhorse deliver"),
            "{told}"
        );
        std::fs::remove_file(data.join("catalogue.lost")).unwrap();
        assert_eq!(report(data), None);
    }
}
