//! The options of a publish: what is refused before anything is read, and what the readers get.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Access;
use crate::api::types::SourceOptions;
use base::blocking::Stop;
use base::fault::Fault;
use base::limits::SETTLE_WAIT_MAX;
use base::names::{ArtifactRef, Kind};
use registry::reference::{check_repository, check_tag};
use source::image::ImageOptions;
use source::labels::LabelOptions;

/// Refuses the options that are for directories of files, with another kind or with a value that is
/// not possible.
pub(super) fn check_files_options(kind: Kind, options: &SourceOptions) -> Result<(), Fault> {
    let given = [
        (!options.exclude.is_empty(), "--exclude"),
        (options.copy_links, "--copy-links"),
        (options.settle_seconds.is_some(), "--settle"),
        (options.name_encoding.is_some(), "--name-encoding"),
        (options.no_times, "--no-times"),
        (options.xattrs, "--xattrs"),
        (options.hard_links, "--hard-links"),
    ];
    let settle = options.settle_seconds.map(Duration::from_secs);
    if settle.is_some_and(|settle| settle > SETTLE_WAIT_MAX) {
        return Err(Fault::usage(format!(
            "--settle can be {} minutes at most: a publish waits no longer for a file",
            SETTLE_WAIT_MAX.as_secs() / 60
        )));
    }
    match given.iter().find(|(is_given, _)| *is_given) {
        Some((_, option)) if !kind.is_files() => Err(Fault::usage(format!(
            "{option} is for datasets, operator projects and models, and this is to be {}",
            kind.with_article()
        ))),
        _ => Ok(()),
    }
}

/// How an image is read.
pub(super) fn image_options(
    options: &SourceOptions,
    access: &Access,
    stop: Stop,
) -> Result<ImageOptions, Fault> {
    let platforms = options.platforms.iter().map(|text| text.parse());
    Ok(ImageOptions {
        platforms: platforms
            .collect::<Result<_, String>>()
            .map_err(|why| Fault::usage(format!("--platform: {why}")))?,
        compress: options.compress,
        unpacked_bytes_max: access.image_unpacked,
        stop,
        referrers: access.carries_referrers(options),
    })
}

/// How labels are read.
pub(super) fn label_options(options: &SourceOptions) -> LabelOptions {
    LabelOptions {
        format: options.format.clone(),
        allow_missing: options.allow_missing,
        columns: options.columns.clone(),
        voc_base: options.voc_base.clone(),
        on_bad: options.on_bad.clone(),
        bad_out: options.bad_out.as_ref().map(PathBuf::from),
        encoding: options.encoding.clone(),
        klarf_scale: options.klarf_scale.clone(),
    }
}

/// Refuses, before anything is read, the name of an image that no registry accepts.
pub fn check_image_name(artifact: &ArtifactRef, options: &SourceOptions) -> Result<(), Fault> {
    if artifact.kind != Kind::Image {
        return Ok(());
    }
    let repository = options.repository.as_deref().unwrap_or(artifact.name());
    check_repository(repository).map_err(|why| {
        Fault::usage(format!(
            "registries do not accept the repository name {repository:?}: {why}"
        ))
        .with_next("give --repository, the name of the image at the sites, or publish it under another name")
    })?;
    match options.tag.as_deref() {
        Some(tag) if !check_tag(tag) => Err(Fault::usage(format!(
            "registries do not accept the tag {tag:?}"
        ))
        .with_next("a tag has at most 128 characters of A-Z, a-z, 0-9, '_', '.' and '-', and does not begin with '.' or '-'")),
        _ => Ok(()),
    }
}

/// Refuses, before anything is read, a file for bad records that exists. Blocks.
pub fn check_bad_out(options: &SourceOptions) -> Result<(), Fault> {
    let file = options.bad_out.as_deref().map(Path::new);
    file.map_or(Ok(()), source::labels::check_bad_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::fault::Code;
    use base::omitted::{Category, Omitted};

    #[test]
    fn referrers_wait_until_all_sites_can_read_them_and_times_do_not_wait_for_that() {
        let given = SourceOptions::default();
        let without = SourceOptions {
            no_referrers: true,
            ..SourceOptions::default()
        };
        let mut left_out = Omitted::default();
        left_out.add(Category::Referrers, "signature sha256:…");
        for (format, carried, times) in [(1, false, false), (2, false, true), (3, true, true)] {
            let access = Access::of_user(Path::new("/nowhere"), format);
            let of = |options: &SourceOptions| {
                image_options(options, &access, Stop::default())
                    .unwrap()
                    .referrers
            };
            assert_eq!((of(&given), of(&without)), (carried, false), "{format}");
            assert_eq!(access.keeps_times(&given), times, "{format}");
            // The note is for those that did not ask for it, of an image that has some.
            let note = |kind, options, omitted: &Omitted| access.note(kind, options, omitted);
            assert_eq!(
                note(Kind::Image, &given, &left_out).is_some(),
                !carried,
                "{format}"
            );
            assert_eq!(note(Kind::Image, &without, &left_out), None);
            assert_eq!(note(Kind::Image, &given, &Omitted::default()), None);
            assert_eq!(
                note(Kind::Model, &given, &Omitted::default()).is_some(),
                !times,
                "{format}"
            );
        }
    }

    #[test]
    fn a_publish_waits_an_hour_at_most_for_a_file() {
        let with = |seconds| SourceOptions {
            settle_seconds: Some(seconds),
            ..SourceOptions::default()
        };
        check_files_options(Kind::Dataset, &with(3600)).unwrap();
        for seconds in [3601, u64::MAX] {
            let fault = check_files_options(Kind::Dataset, &with(seconds)).unwrap_err();
            assert!(
                fault.code == Code::Usage && fault.message.contains("60 minutes"),
                "{fault}"
            );
        }
        let fault = check_files_options(Kind::Image, &with(1)).unwrap_err();
        assert!(fault.message.contains("--settle is for"), "{fault}");
    }
}
