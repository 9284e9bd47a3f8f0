//! The settings of a label set, from the options of the publish and from the words among its
//! columns that are no fields.

use base::fault::Fault;

use super::LabelOptions;
use super::collect::Collector;
use super::encoding::TextEncoding;
use super::guess::Format;
use super::klarf::KlarfSettings;
use super::path_rules::{PathFrom, PathRules};
use super::refuse::OnBad;
use super::table;
use super::table_boxes::BoxForm;
use super::table_fields::field_names;
use super::voc_base::VocBase;
use super::yolo_rows::Task;

/// The settings among the columns, which are no fields.
const NAMES: [&str; 11] = [
    "path_strip",
    "path_keep",
    "path_prefix",
    "path_suffix",
    "path_from",
    "predictions",
    "normalised",
    "bbox_format",
    "yolo_task",
    "kpt_shape",
    "klarf_image",
];

/// How labels are read, as far as somebody said it.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) path: PathRules,
    pub(super) encoding: Option<TextEncoding>,
    /// Predictions of Label Studio are taken too.
    pub(super) predictions: bool,
    pub(super) table: table::TableSettings,
    pub(super) voc_base: Option<VocBase>,
    pub(super) yolo_task: Option<Task>,
    pub(super) on_bad: OnBad,
    pub(super) klarf: KlarfSettings,
}

impl Settings {
    /// Reads them; what is said of another format is refused.
    pub(super) fn parse(options: &LabelOptions, format: Option<Format>) -> Result<Self, Fault> {
        let get = |name: &str| {
            options
                .columns
                .get(name)
                .map(String::as_str)
                .filter(|value| !value.is_empty())
        };
        let switch = |name: &str| match get(name) {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(other) => Err(Fault::usage(format!(
                "{name} is true or false, not {other:?}"
            ))),
        };
        let keep = get("path_keep").map(|number| match number.parse::<usize>() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(Fault::usage(format!(
                "path_keep is a number of components, not {number:?}"
            ))),
        });
        let from = match get("path_from") {
            None => PathFrom::Either,
            Some("record") => PathFrom::Record,
            Some("image") => PathFrom::Image,
            Some(other) => {
                return Err(Fault::usage(format!(
                    "path_from is record or image, not {other:?}"
                )));
            }
        };
        let own = |name: &str| get(name).map(str::to_owned);
        let path = PathRules {
            strip: own("path_strip"),
            keep: keep.transpose()?,
            prefix: own("path_prefix"),
            suffix: own("path_suffix"),
            from,
        };
        if let Some(base) = &options.voc_base
            && format != Some(Format::Voc)
        {
            let format = format.map_or("database", Format::as_str);
            return Err(Fault::usage(format!(
                "--voc-base {base} is of Pascal VOC, and these labels are {format}"
            ))
            .with_next("leave --voc-base out, or name the format: --format voc"));
        }
        if let Some(scale) = &options.klarf_scale
            && format != Some(Format::Klarf)
        {
            let format = format.map_or("database", Format::as_str);
            return Err(Fault::usage(format!(
                "--klarf-scale {scale} is of KLARF, and these labels are {format}"
            ))
            .with_next("leave --klarf-scale out, or name the format: --format klarf"));
        }
        Ok(Self {
            path,
            encoding: options.encoding.as_deref().map(str::parse).transpose()?,
            predictions: switch("predictions")?.unwrap_or(false),
            table: table::TableSettings {
                form: get("bbox_format").map(str::parse::<BoxForm>).transpose()?,
                normalised: switch("normalised")?,
            },
            voc_base: options.voc_base.as_deref().map(str::parse).transpose()?,
            on_bad: options
                .on_bad
                .as_deref()
                .map(str::parse)
                .transpose()?
                .unwrap_or_default(),
            klarf: klarf(options.klarf_scale.as_deref(), get("klarf_image"))?,
            yolo_task: yolo_task(get("yolo_task"), get("kpt_shape"))?,
        })
    }

    /// Hands the collector what it needs of them.
    pub(super) fn collector(&self, scratch: &std::path::Path) -> Collector {
        let mut collector = Collector::new(scratch, self.path.clone());
        collector.encoding = self.encoding;
        collector.refusals.on_bad = self.on_bad;
        collector
    }
}

fn klarf(scale: Option<&str>, image: Option<&str>) -> Result<KlarfSettings, Fault> {
    let scale = scale.map(|text| match text.parse::<f64>() {
        Ok(scale) if scale.is_finite() && scale > 0.0 => Ok(scale),
        _ => Err(Fault::usage(format!(
            "--klarf-scale is the width of a pixel in micrometres, not {text:?}"
        ))),
    });
    let is_patch = match image {
        None | Some("die") => false,
        Some("defect") => true,
        Some(other) => {
            return Err(Fault::usage(format!(
                "klarf_image is die or defect, not {other:?}"
            )));
        }
    };
    Ok(KlarfSettings {
        scale: scale.transpose()?,
        is_patch,
    })
}

fn yolo_task(task: Option<&str>, shape: Option<&str>) -> Result<Option<Task>, Fault> {
    let shape = match shape {
        None => None,
        Some(text) => {
            let numbers: Vec<&str> = text.split(['x', ',']).collect();
            let number = |at: usize| {
                numbers
                    .get(at)
                    .and_then(|text| text.trim().parse::<usize>().ok())
            };
            match (number(0), number(1), numbers.len()) {
                (Some(points @ 1..=1000), Some(values @ (2 | 3)), 2) => {
                    Some(Task::Pose(points, values))
                }
                _ => {
                    return Err(Fault::usage(format!(
                        "kpt_shape is POINTSx2 or POINTSx3, such as 17x3, not {text:?}"
                    )));
                }
            }
        }
    };
    match (task, shape) {
        (None | Some("pose"), Some(pose)) => Ok(Some(pose)),
        (None, None) => Ok(None),
        (Some("detect"), None) => Ok(Some(Task::Detect)),
        (Some("segment"), None) => Ok(Some(Task::Segment)),
        (Some("pose"), None) => Err(Fault::usage("yolo_task=pose needs kpt_shape")
            .with_next("name the keypoints of a box, such as --column kpt_shape=17x3")),
        (Some(other), None) => Err(Fault::usage(format!(
            "yolo_task is detect, segment or pose, not {other:?}"
        ))),
        (Some(other), Some(_)) => Err(Fault::usage(format!(
            "kpt_shape goes with yolo_task=pose, not {other}"
        ))),
    }
}

/// Refuses columns that are neither fields of this format nor settings; a query of a database has
/// no format.
pub(super) fn check_columns(format: Option<Format>, options: &LabelOptions) -> Result<(), Fault> {
    for name in options.columns.keys().map(String::as_str) {
        if NAMES.contains(&name) {
            continue;
        }
        let Some(format) = format else {
            return Err(Fault::usage(format!(
                "a query names its columns itself, so {name:?} cannot be mapped"
            ))
            .with_next("rename columns in the query by AS"));
        };
        let known = field_names();
        if !known.contains(&name) {
            let next = format!("use one of {}, {}", known.join(", "), NAMES.join(", "));
            return Err(Fault::usage(format!(
                "labels have no field {name:?} that a column could hold"
            ))
            .with_next(next));
        }
        if !matches!(format, Format::Csv | Format::Jsonl) {
            return Err(Fault::usage(format!(
                "{format} labels have no columns, so {name:?} cannot be taken from one"
            ))
            .with_next("leave the column mapping out, or name the format csv or jsonl"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(columns: &[(&str, &str)], format: Option<Format>) -> Result<Settings, Fault> {
        let columns = columns
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Settings::parse(
            &LabelOptions {
                columns,
                ..LabelOptions::default()
            },
            format,
        )
    }

    #[test]
    fn words_of_settings() {
        let yolo = |columns: &[(&str, &str)]| {
            parse(columns, Some(Format::Yolo)).map(|settings| settings.yolo_task)
        };
        assert_eq!(yolo(&[]).unwrap(), None);
        assert_eq!(
            yolo(&[("kpt_shape", "17x3")]).unwrap(),
            Some(Task::Pose(17, 3))
        );
        assert_eq!(
            yolo(&[("kpt_shape", "4,2"), ("yolo_task", "pose")]).unwrap(),
            Some(Task::Pose(4, 2))
        );
        assert_eq!(
            yolo(&[("yolo_task", "segment")]).unwrap(),
            Some(Task::Segment)
        );
        for bad in [
            ("yolo_task", "pose"),
            ("yolo_task", "obb"),
            ("kpt_shape", "17"),
            ("kpt_shape", "17x4"),
            ("normalised", "yes"),
            ("bbox_format", "ltrb"),
            ("path_keep", "0"),
            ("path_from", "xml"),
        ] {
            assert!(parse(&[bad], Some(Format::Csv)).is_err(), "{bad:?}");
        }
        let options = LabelOptions {
            voc_base: Some("0".into()),
            ..LabelOptions::default()
        };
        assert!(Settings::parse(&options, Some(Format::Voc)).is_ok());
        assert!(
            Settings::parse(&options, Some(Format::Coco)).is_err()
                && Settings::parse(&options, None).is_err()
        );
        let options = LabelOptions {
            encoding: Some("klingon".into()),
            ..LabelOptions::default()
        };
        assert!(Settings::parse(&options, Some(Format::Csv)).is_err());
    }
}
