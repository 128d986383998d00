// Errors that are shown to the user, each as a sentence that says what is wrong and what to do.

/** An error with a message for the user. status: the HTTP status, or 0 if the source did not answer. */
export class SourceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "SourceError";
    this.status = status;
  }
}

/** Whether a request was cancelled because of a newer one. Such an error is not shown. */
export const isAbort = (error) => error?.name === "AbortError";

/** The sentence to show. An error that is not a SourceError is a bug in these pages, so it is also logged. */
export function sentence(error) {
  if (error instanceof SourceError) return error.message;
  console.error(error);
  return `Unexpected error in this page: ${error?.message ?? error}`;
}
