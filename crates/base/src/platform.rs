//! The platforms of images: `os/architecture[/variant]`, as container tools write them.

use std::fmt;
use std::str::FromStr;

/// A platform that a user selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    os: String,
    architecture: String,
    /// Any variant if it is empty.
    variant: String,
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [architecture] => ("linux", *architecture, ""),
            [os, architecture] => (*os, *architecture, ""),
            [os, architecture, variant] => (*os, *architecture, *variant),
            _ => ("", "", ""),
        };
        let is_word = |word: &str| {
            word.len() <= 32
                && word
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        };
        let words = [os, architecture, variant];
        if os.is_empty() || architecture.is_empty() || !words.into_iter().all(is_word) {
            return Err(format!(
                "{:?} is not a platform; write OS/ARCHITECTURE, such as linux/amd64",
                text.chars().take(100).collect::<String>()
            ));
        }
        let [os, architecture, variant] = words.map(str::to_ascii_lowercase);
        let architecture = usual_name(&architecture).to_owned();
        Ok(Self {
            os,
            architecture,
            variant,
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.variant)
        }
    }
}

impl Platform {
    /// Whether this selects a platform with these values of a manifest.
    pub fn selects(&self, os: &str, architecture: &str, variant: &str) -> bool {
        // The variant of 64-bit ARM is often left out.
        let variant = if variant.is_empty() && usual_name(architecture) == "arm64" {
            "v8"
        } else {
            variant
        };
        self.os == os
            && self.architecture == usual_name(architecture)
            && (self.variant.is_empty() || self.variant == variant)
    }
}

/// The name of an architecture in manifests.
fn usual_name(architecture: &str) -> &str {
    match architecture {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_selected_as_container_tools_do() {
        let selects = |wanted: &str, (os, architecture, variant)| {
            wanted
                .parse::<Platform>()
                .unwrap()
                .selects(os, architecture, variant)
        };
        assert!(selects("linux/amd64", ("linux", "amd64", "")));
        assert!(selects("amd64", ("linux", "amd64", "")));
        assert!(selects("linux/x86_64", ("linux", "amd64", "")));
        assert!(selects("linux/arm64", ("linux", "arm64", "v8")));
        assert!(selects("linux/arm64/v8", ("linux", "arm64", "")));
        assert!(selects("linux/arm", ("linux", "arm", "v7")));
        assert!(!selects("linux/arm/v6", ("linux", "arm", "v7")));
        assert!(!selects("linux/amd64", ("windows", "amd64", "")));
        assert!(!selects("linux/amd64", ("unknown", "unknown", "")));
        for bad in ["", "/", "linux/", "a/b/c/d", "linux/am d64", "/amd64"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
