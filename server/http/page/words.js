// Numbers for people.

function scaled(value, step, units) {
  let unit = 0;
  while (Math.abs(value) >= step && unit < units.length - 1) { value /= step; unit += 1; }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}
export const size = (bytes) => scaled(bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
export const rate = (bytes) => scaled(bytes, 1000, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"]);
export const count = (number) => number.toLocaleString("en-US");
export const short = (number) =>
  number < 10000 ? count(number)
    : number.toLocaleString("en-US", { notation: "compact", maximumFractionDigits: 1 });
export const percent = (part) => `${(part * 100).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
export const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");

export function duration(seconds) {
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 0.01 ? 2 : 1)} ms`;
  return `${seconds.toFixed(2)} s`;
}

export function age(seconds) {
  const [days, hours, mins] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${mins % 60} min`;
  return mins ? `${mins} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}
