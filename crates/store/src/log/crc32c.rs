//! CRC-32C (Castagnoli), eight bytes a step, from tables made at compile time.

const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    // tables[n][b] is the effect of byte b with n zero bytes behind it.
    let mut n = 1;
    while n < 8 {
        let mut byte = 0;
        while byte < 256 {
            let crc = tables[n - 1][byte];
            tables[n][byte] = (crc >> 8) ^ tables[0][(crc & 0xff) as usize];
            byte += 1;
        }
        n += 1;
    }
    tables
}

/// The checksum of all parts, one after the other.
pub(crate) fn checksum(parts: &[&[u8]]) -> u32 {
    let mut running = Running::new();
    parts.iter().for_each(|part| running.add(part));
    running.get()
}

/// A checksum of bytes that come part by part.
pub(crate) struct Running(u32);

impl Running {
    pub fn new() -> Self {
        Self(!0)
    }

    pub fn add(&mut self, bytes: &[u8]) {
        self.0 = update(self.0, bytes);
    }

    pub fn get(&self) -> u32 {
        !self.0
    }
}

fn update(crc: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<8>();
    let crc = words.iter().fold(crc, |crc, word| {
        let [c0, c1, c2, c3] = crc.to_le_bytes();
        TABLES[7][usize::from(word[0] ^ c0)]
            ^ TABLES[6][usize::from(word[1] ^ c1)]
            ^ TABLES[5][usize::from(word[2] ^ c2)]
            ^ TABLES[4][usize::from(word[3] ^ c3)]
            ^ TABLES[3][usize::from(word[4])]
            ^ TABLES[2][usize::from(word[5])]
            ^ TABLES[1][usize::from(word[6])]
            ^ TABLES[0][usize::from(word[7])]
    });
    rest.iter().fold(crc, |crc, byte| (crc >> 8) ^ TABLES[0][usize::from(crc as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    use super::checksum;

    /// The vectors of RFC 3720, appendix B.4, and the usual check value.
    #[test]
    fn known_vectors() {
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let cases: [(&[u8], u32); 6] = [
            (b"", 0),
            (b"123456789", 0xe306_9283),
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (&descending, 0x113f_db5c),
        ];
        for (bytes, crc) in cases {
            assert_eq!(checksum(&[bytes]), crc, "{bytes:?}");
            for cut in 0..bytes.len() {
                assert_eq!(checksum(&[&bytes[..cut], &bytes[cut..]]), crc, "{bytes:?} in two parts at {cut}");
            }
        }
    }
}
