//! Image references, read as docker reads them: `nginx:test1` is `docker.io/library/nginx:test1`.

use std::fmt;

use super::ImageError;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// `docker.io`, `localhost:5000` …
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    /// `sha256:…`
    pub digest: Option<String>,
}

impl Reference {
    /// Without tag and digest, the tag is `latest`.
    pub fn parse(text: &str) -> Result<Reference, ImageError> {
        let invalid = |why: &str| ImageError::InvalidName { name: text.to_owned(), why: why.to_owned() };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest
            && !is_digest(digest)
        {
            return Err(invalid("the digest is not sha256: and 64 hexadecimal digits"));
        }
        // A colon after the last slash starts the tag; one before it belongs to the registry's port.
        let (name, tag) = match rest.rfind(':') {
            Some(at) if !rest[at..].contains('/') => (&rest[..at], Some(&rest[at + 1..])),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && (tag.is_empty()
                || tag.len() > 128
                || !tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
                || tag.starts_with(['.', '-']))
        {
            return Err(invalid("the tag may hold letters, digits and . _ - only"));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest.to_owned()),
            Some(_) => ("docker.io", name.to_owned()),
            None => ("docker.io", format!("library/{name}")),
        };
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        let path_is_valid = path.split('/').all(|part| {
            !part.is_empty()
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
                && part.starts_with(|c: char| c.is_ascii_alphanumeric())
        });
        let registry_is_valid = registry.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
            && registry.chars().all(|c| c.is_ascii_alphanumeric() || ".-_:[]".contains(c));
        if name.is_empty() || !registry_is_valid || !path_is_valid {
            return Err(invalid("the name must be lower case letters, digits and . _ - / only"));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Reference { registry: registry.to_owned(), repository: path, tag, digest: digest.map(str::to_owned) })
    }

    /// Without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The default of imagePullPolicy depends on it.
    pub fn is_latest(&self) -> bool {
        self.digest.is_none() && self.tag.as_deref() == Some("latest")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_read_as_docker_reads_them() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, full) in [
            ("nginx", "docker.io/library/nginx:latest".to_owned()),
            ("nginx:test1", "docker.io/library/nginx:test1".to_owned()),
            ("bitnami/nginx", "docker.io/bitnami/nginx:latest".to_owned()),
            ("localhost/x:1", "localhost/x:1".to_owned()),
            ("localhost:5000/a/b", "localhost:5000/a/b:latest".to_owned()),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9".to_owned()),
            (&format!("nginx@{digest}"), format!("docker.io/library/nginx@{digest}")),
            (&format!("nginx:1@{digest}"), format!("docker.io/library/nginx:1@{digest}")),
        ] {
            assert_eq!(Reference::parse(text).expect(text).to_string(), full);
        }
        for text in ["", "Nginx", "a//b", "nginx:", "nginx:-x", "nginx@sha256:12", "a b", "../x", "docker.io/"] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
    }
}
