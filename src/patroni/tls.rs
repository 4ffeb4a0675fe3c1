//! What https to Patroni needs: one own CA, perhaps a client certificate, and TLS errors in words that name the cure.
//! No public CAs: none of them shall vouch for a Patroni. Knows nothing of connections.

use crate::file;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{AlertDescription, CertificateError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use ureq::Error;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

const FILE_LIMIT: u64 = 1024 * 1024;

/// The TLS options, in curl's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// `--cacert`: a PEM file with the CA of Patroni's certificate.
    pub cacert: Option<PathBuf>,
    /// `--cert`: a PEM file with the client certificate.
    pub cert: Option<PathBuf>,
    /// `--key`: a PEM file with the client certificate's key.
    pub key: Option<PathBuf>,
    /// `--insecure`: Patroni's certificate is not verified.
    pub insecure: bool,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// A file cannot be read or does not hold what its option promises.
    pub fn config(&self) -> Result<TlsConfig, String> {
        let provider = Arc::new(ring::default_provider());
        let mut config = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(provider.clone())
            .disable_verification(self.insecure);
        // ureq's default is a public list that is not linked in, and asking for it panics.
        let mut roots = Vec::new();
        if let Some(file) = &self.cacert {
            roots = certificates(file)?;
        }
        config = config.root_certs(RootCerts::new_with_certs(&roots));
        if let Some(file) = &self.cert {
            let chain = certificates(file)?;
            let key_file = self.key.as_deref().unwrap_or(file);
            let key = private_key(key_file)?;
            fit(&chain, &key, &provider).map_err(|error| {
                format!("{} and {}: {error}", file.display(), key_file.display())
            })?;
            config = config.client_cert(Some(ClientCert::new_with_certs(&chain, key)));
        }
        Ok(config.build())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    file::read(path, FILE_LIMIT).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn certificates(file: &Path) -> Result<Vec<Certificate<'static>>, String> {
    let mut certificates = Vec::new();
    for item in parse_pem(&read(file)?) {
        match item {
            Ok(PemItem::Certificate(certificate)) => certificates.push(certificate),
            Ok(_) => {}
            Err(error) => return Err(format!("{}: {error}", file.display())),
        }
    }
    if certificates.is_empty() {
        return Err(format!("{} contains no PEM certificate", file.display()));
    }
    Ok(certificates)
}

fn private_key(file: &Path) -> Result<PrivateKey<'static>, String> {
    PrivateKey::from_pem(&read(file)?)
        .map_err(|_| format!("{} contains no PEM private key without a passphrase", file.display()))
}

/// ureq panics on a key that is broken or belongs to another certificate.
fn fit(
    chain: &[Certificate<'static>],
    key: &PrivateKey<'static>,
    provider: &CryptoProvider,
) -> Result<(), String> {
    let chain =
        chain.iter().map(|certificate| CertificateDer::from(certificate.der().to_vec())).collect();
    let key = PrivateKeyDer::try_from(key.der().to_vec()).map_err(str::to_owned)?;
    rustls::sign::CertifiedKey::from_der(chain, key, provider)
        .map(|_| ())
        .map_err(|error| error.to_string())
}

/// Puts a TLS error into words; `None` if it is no TLS error. `host` is the URL's.
pub fn in_words(error: &Error, host: &str) -> Option<String> {
    use rustls::Error::{AlertReceived, InvalidCertificate, InvalidMessage};
    let Error::Io(error) = error else { return None };
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => {
            format!("certificate is not for {host}: use its name in --url and --connect-to {host}")
        }
        InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is not signed by the CA in --cacert".to_owned()
        }
        InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "its certificate has expired".to_owned()
        }
        InvalidMessage(_) => "it does not speak TLS; should --url be http://?".to_owned(),
        AlertReceived(AlertDescription::CertificateRequired) => {
            "it requires a client certificate: --cert and --key".to_owned()
        }
        AlertReceived(alert) => format!("it refused the TLS connection: {alert:?} (--cert, --key)"),
        error => format!("TLS: {error}"),
    })
}
